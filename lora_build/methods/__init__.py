"""Methods: how adapters change weights; one file, or one folder, for each."""

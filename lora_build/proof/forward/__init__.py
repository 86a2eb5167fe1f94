"""The forward check: whether a build answers as its base with the adapters beside it."""

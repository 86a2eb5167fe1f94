"""The wrapper: adapters on a live model, applied unmerged, merged, and taken off again."""

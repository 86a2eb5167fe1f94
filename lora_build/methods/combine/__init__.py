"""Combinations: how the changes of several adapters become one; one file for each, found by its `COMBINATION`."""

"""Backends: what merges a block of rows; the compiled loops, torch, and peft's own operations."""

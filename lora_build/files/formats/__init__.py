"""Formats: what is in a safetensors file, a checkpoint's folder, an adapter's folder."""

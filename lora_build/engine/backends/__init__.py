"""Backends: what makes blocks. The compiled pass, torch for what is more than a sum of products, and peft's own way."""

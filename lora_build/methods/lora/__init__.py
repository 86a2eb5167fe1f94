"""LoRA and its family."""

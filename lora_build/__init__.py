"""lora-build: merged LoRA checkpoints from recipes in git; same recipe, same bytes."""

__version__ = "0.1.0"

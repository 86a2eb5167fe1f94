"""The engine: does what a plan says, block by block."""

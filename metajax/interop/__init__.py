"""Checkpoints of other programs, read and written: Hugging Face directories and GGUF."""

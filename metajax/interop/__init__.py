"""Import and export of checkpoints of other programs: Hugging Face directories and GGUF."""

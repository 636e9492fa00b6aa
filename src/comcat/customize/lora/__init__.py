"""Other tools' LoRA files: their names, their algebra, and the way in and out with its error."""

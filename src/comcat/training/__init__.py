"""Parts of the fine-tuning engine: configuration, losses, schedules, randomness, checkpoints, logs and the loop."""

"""Training: Ray Train starts the workers, DeepSpeed shards them, checkpoints are ours (docs/design/0020, 0021)."""

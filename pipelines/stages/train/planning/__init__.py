"""Plans of training: memory, disk, time and cost of a `train` stage before it runs (docs/design/0029)."""

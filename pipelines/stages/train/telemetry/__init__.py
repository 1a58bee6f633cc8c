"""What a training tells of itself beside its losses (docs/design/0027)."""

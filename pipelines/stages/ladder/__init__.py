"""Scaling ladders: the loss of a few sizes against their compute, and what the next size would reach."""

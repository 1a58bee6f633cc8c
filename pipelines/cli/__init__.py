"""The `bmojo` command."""

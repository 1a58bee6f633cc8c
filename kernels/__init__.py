"""Operators of the B'MOJO family: a readable reference beside a fast path, called alike."""

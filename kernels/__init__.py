"""Operators of the B'MOJO family: a readable reference beside a fast path, with the same arguments in the same order."""

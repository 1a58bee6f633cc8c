"""Operators of the B'MOJO models: one folder each, declared with kernels.operator.Operator, beside what they share."""

"""Products with a weight matrix: most of what a training step on a CPU computes."""

from __future__ import annotations

from kernels.linear import cpp_path, reference, torch_path
from kernels.linear.reference import LinearInputs, ProductInputs
from kernels.operator import Operator, random_tensors

__all__ = ["linear", "product"]

linear = Operator(
    "linear",
    LinearInputs,
    reference=reference.linear,
    torch=torch_path.linear,
    cpp=cpp_path.linear,
    example=lambda: LinearInputs(*(x.requires_grad_() for x in random_tensors((2, 5, 8), (6, 8)))),
    autocast="follow",
)
product = Operator(
    "product",
    ProductInputs,
    reference=reference.product,
    torch=torch_path.product,
    cpp=cpp_path.product,
    example=lambda: ProductInputs(*random_tensors((2, 5, 8), (6, 8))),
    autocast="follow",
)

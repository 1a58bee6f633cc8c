"""Products with a weight matrix: most of what a training step computes."""

from __future__ import annotations

from torch import Tensor

from kernels.linear import cpp_path, reference, torch_path
from kernels.linear.reference import LinearInputs, Parts, PartsInputs, ProductInputs
from kernels.operator import Operator, Path, random_tensors
from kernels.pointwise import split

__all__ = ["linear", "linear_parts", "product"]


def _linear_then_split(inputs: PartsInputs) -> Parts:
    return Parts(*split(linear(inputs.x, inputs.weight_oi), inputs.widths))


def _triton() -> Path[PartsInputs, Parts]:
    from kernels.linear import triton_path

    return triton_path.linear_parts


def _few_rows() -> Path[LinearInputs, Tensor]:
    from kernels.linear import triton_few_rows

    return triton_few_rows.linear


def _example_of_parts() -> PartsInputs:
    x, weight_oi = random_tensors((2, 5, 8), (7, 8))
    return PartsInputs(x.requires_grad_(), weight_oi.requires_grad_(), (3, 3, 1))


linear = Operator(
    "linear",
    LinearInputs,
    reference=reference.linear,
    torch=torch_path.linear,
    cpp=cpp_path.linear,
    triton=_few_rows,
    example=lambda: LinearInputs(*(x.requires_grad_() for x in random_tensors((2, 5, 8), (6, 8)))),
    autocast="follow",
)
linear_parts = Operator(
    "linear_parts",
    PartsInputs,
    reference=reference.linear_parts,
    torch=Path(_linear_then_split, tolerance=torch_path.TOLERANCE),
    cpp=Path(_linear_then_split, tolerance=cpp_path.TOLERANCE),
    triton=_triton,
    example=_example_of_parts,
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

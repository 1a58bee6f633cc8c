"""Products with a weight matrix: most of what a training step computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.linear import cpp_path, reference, torch_path
from kernels.linear.reference import EachInputs, GatedInputs, LinearInputs, Parts, PartsInputs, ProductInputs
from kernels.operator import Operator, Path, random_tensors
from kernels.pointwise import gated_product, split
from kernels.pointwise import torch_path as pointwise_path

__all__ = ["gated_linear", "linear", "linear_each", "linear_parts", "product"]


def _linear_then_split(inputs: PartsInputs) -> Parts:
    return Parts(*split(linear(inputs.x, inputs.weight_oi), inputs.widths))


def _linear_of_each(inputs: EachInputs) -> tuple[Tensor, ...]:
    return tuple(linear(inputs.x, weight_oi) for weight_oi in inputs.weights)


def _linear_then_gate(inputs: LinearInputs) -> Tensor:
    return gated_product(linear(*inputs))


def _triton() -> Path[PartsInputs, Parts]:
    from kernels.linear import triton_path

    return triton_path.linear_parts


def _few_rows(name: str) -> Callable[[], Path[Any, Any]]:
    """Imports Triton if there is a GPU."""

    def path() -> Path[Any, Any]:
        from kernels.linear import triton_few_rows

        found: Path[Any, Any] = getattr(triton_few_rows, name)
        return found

    return path


def _example_of_parts() -> PartsInputs:
    x, weight_oi = random_tensors((2, 5, 8), (7, 8))
    return PartsInputs(x.requires_grad_(), weight_oi.requires_grad_(), (3, 3, 1))


linear = Operator(
    "linear",
    LinearInputs,
    reference=reference.linear,
    torch=torch_path.linear,
    static=torch_path.linear,
    cpp=cpp_path.linear,
    triton=_few_rows("linear"),
    example=lambda: LinearInputs(*(x.requires_grad_() for x in random_tensors((2, 5, 8), (6, 8)))),
    autocast="follow",
)
linear_each = Operator(
    "linear_each",
    EachInputs,
    reference=reference.linear_each,
    torch=Path(_linear_of_each, tolerance=torch_path.TOLERANCE),
    static=Path(_linear_of_each, tolerance=torch_path.TOLERANCE),
    cpp=Path(_linear_of_each, tolerance=cpp_path.TOLERANCE),
    triton=_few_rows("linear_each"),
    example=lambda: EachInputs(random_tensors((2, 5, 8))[0], tuple(random_tensors((6, 8), (3, 8)))),
    autocast="follow",
)
gated_linear = Operator(
    "gated_linear",
    GatedInputs,
    reference=reference.gated_linear,
    torch=Path(_linear_then_gate, tolerance=pointwise_path.TOLERANCE),
    static=Path(_linear_then_gate, tolerance=pointwise_path.TOLERANCE),
    cpp=Path(_linear_then_gate, tolerance=pointwise_path.TOLERANCE),
    triton=_few_rows("gated_linear"),
    example=lambda: GatedInputs(*(x.requires_grad_() for x in random_tensors((2, 5, 8), (6, 8)))),
    autocast="follow",
)
linear_parts = Operator(
    "linear_parts",
    PartsInputs,
    reference=reference.linear_parts,
    torch=Path(_linear_then_split, tolerance=torch_path.TOLERANCE),
    static=Path(_linear_then_split, tolerance=torch_path.TOLERANCE),
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
    static=torch_path.product,
    cpp=cpp_path.product,
    example=lambda: ProductInputs(*random_tensors((2, 5, 8), (6, 8))),
    autocast="follow",
)

"""Products with a weight matrix: most of what a training step computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.linear import cpp_path, reference, torch_path
from kernels.linear.reference import (
    EachInputs,
    GatedInputs,
    GatedNormLinearInputs,
    LinearInputs,
    Parts,
    PartsInputs,
    ProductInputs,
    SwiGLUInputs,
)
from kernels.operator import Operator, Path, random_tensors
from kernels.pointwise import gated_product, gated_rms_norm, split
from kernels.pointwise import torch_path as pointwise_path

__all__ = ["gated_linear", "gated_norm_linear", "linear", "linear_each", "linear_parts", "product", "swiglu"]


def _linear_then_split(inputs: PartsInputs) -> Parts:
    return Parts(*split(linear(inputs.x, inputs.weight_oi), inputs.widths))


def _linear_of_each(inputs: EachInputs) -> tuple[Tensor, ...]:
    return tuple(linear(inputs.x, weight_oi) for weight_oi in inputs.weights)


def _linear_then_gate(inputs: LinearInputs) -> Tensor:
    return gated_product(linear(*inputs))


def _gated_linear_then_down(inputs: SwiGLUInputs) -> Tensor:
    return linear(gated_linear(inputs.x, inputs.gate_up_oi), inputs.down_oi)


def _norm_then_linear(inputs: GatedNormLinearInputs) -> Tensor:
    return linear(gated_rms_norm(*inputs[:4]), inputs.weight_oi)


def _triton(name: str) -> Callable[[], Path[Any, Any]]:
    """Imports Triton if there is a GPU."""

    def path() -> Path[Any, Any]:
        from kernels.linear import triton_path

        found: Path[Any, Any] = getattr(triton_path, name)
        return found

    return path


def _example_of_parts() -> PartsInputs:
    x, weight_oi = random_tensors((2, 5, 8), (7, 8))
    return PartsInputs(x.requires_grad_(), weight_oi.requires_grad_(), (3, 3, 1))


def _example_of_gated_norm() -> GatedNormLinearInputs:
    x, gate, norm_weight, weight_oi = (x.requires_grad_() for x in random_tensors((2, 5, 8), (2, 5, 8), (8,), (4, 8)))
    return GatedNormLinearInputs(x, gate, norm_weight, 1e-5, weight_oi)


linear = Operator(
    "linear",
    LinearInputs,
    reference=reference.linear,
    torch=torch_path.linear,
    static=torch_path.linear,
    cpp=cpp_path.linear,
    triton=_triton("linear"),
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
    triton=_triton("linear_each"),
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
    triton=_triton("gated_linear"),
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
    triton=_triton("linear_parts"),
    example=_example_of_parts,
    autocast="follow",
)
swiglu = Operator(
    "swiglu",
    SwiGLUInputs,
    reference=reference.swiglu,
    torch=Path(_gated_linear_then_down, tolerance=pointwise_path.TOLERANCE),
    static=Path(_gated_linear_then_down, tolerance=pointwise_path.TOLERANCE),
    cpp=Path(_gated_linear_then_down, tolerance=pointwise_path.TOLERANCE),
    triton=_triton("swiglu"),
    example=lambda: SwiGLUInputs(*(x.requires_grad_() for x in random_tensors((2, 5, 8), (6, 8), (4, 3)))),
    autocast="follow",
)
gated_norm_linear = Operator(
    "gated_norm_linear",
    GatedNormLinearInputs,
    reference=reference.gated_norm_linear,
    torch=Path(_norm_then_linear, tolerance=pointwise_path.TOLERANCE),
    static=Path(_norm_then_linear, tolerance=pointwise_path.TOLERANCE),
    cpp=Path(_norm_then_linear, tolerance=pointwise_path.TOLERANCE),
    triton=_triton("gated_norm_linear"),
    example=_example_of_gated_norm,
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

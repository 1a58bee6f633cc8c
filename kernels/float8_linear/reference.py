"""Inputs and meaning of a projection in float8."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import Path, random_tensors

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
"""Formats of x and W, and of the gradient of y (P. Micikevicius et al., arXiv:2209.05433)."""
SMALLEST = 1e-30
"""What counts as the largest value where all are smaller: 1 / SMALLEST is still finite."""


class Float8Inputs(NamedTuple):
    """x W^T over the last dimension, of x and W rounded to float8; as `linear` but for the rounding.

    A tensor is rounded as a whole: it is scaled so that its largest value is the largest of the format, and kept with
    that scale. x and W become e4m3, which has 3 bits behind the point. The gradient of y becomes e5m2: 2 bits, and a
    wider range. Gradients of x and W are products of these rounded tensors; rounding has the gradient 1. Sums are in
    float32.

    Args: x: [..., i], at least one row.  weight_oi: [o, i], in any floating-point dtype, that of its gradient. It is
        first rounded to the dtype of x, as autocast does.
    Returns: [..., o] in the dtype of x. NaN or inf anywhere gives NaN.
    Raises: ValueError: shapes that do not go together, or no row.
    """

    x: Tensor
    weight_oi: Tensor


def check(inputs: Float8Inputs) -> None:
    """See Float8Inputs."""
    x, weight_oi = inputs
    if not x.numel() or weight_oi.dim() != 2 or x.shape[-1] != weight_oi.shape[1]:
        raise ValueError(
            f"float8_linear: found x {tuple(x.shape)} and a weight {tuple(weight_oi.shape)}, expected x (..., i) with "
            "at least one row, and a weight (o, i)."
        )


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What float8 keeps of x, in the dtype of x or float32; the scale is float32 in any case."""
    limit = torch.finfo(dtype).max
    largest = x.float().abs().max().clamp_min(SMALLEST)
    scale = torch.full_like(largest, limit) / largest
    kept = (x.float() * scale).clamp(-limit, limit).to(dtype)
    precise = torch.promote_types(x.dtype, torch.float32)
    return kept.to(precise) / scale.to(precise)


class _RoundForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded(x.to(dtype), FORWARD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RoundBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return rounded(grad, GRADIENT)


def _run(inputs: Float8Inputs) -> Tensor:
    dtype = inputs.x.dtype
    x, weight_oi = (_RoundForward.apply(factor, dtype) for factor in inputs)
    y: Tensor = _RoundBackward.apply(F.linear(x, weight_oi))
    return y.to(dtype)


def example() -> Float8Inputs:
    """A small call."""
    return Float8Inputs(*(x.requires_grad_() for x in random_tensors((2, 5, 16), (6, 16))))


float8_linear = Path(_run)

"""Products by oneDNN, which is part of torch: Inductor calls the same operator, torch.nn.functional.linear does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear.reference import LinearInputs
from kernels.operator import Path

TOLERANCE = {torch.float32: 2e-6}  # sums of up to a few thousand products in another order
HAS_OPERATOR = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_oi)
        return onednn(x, weight_oi)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_oi = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = onednn(grad_y, weight_oi.t()) if wants_x else None
        grad_weight_oi = _rows(grad_y).t() @ _rows(x) if wants_weight else None  # oneDNN is slow at these
        return grad_x, grad_weight_oi


def onednn(x: Tensor, weight_oi: Tensor) -> Tensor:
    """x W^T."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_oi, None, "none", [], "")
    return y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _refuses(inputs: LinearInputs) -> str | None:
    """The reason why not, if any. oneDNN prepares each new shape, so it is for training, which repeats them."""
    if not (torch.is_grad_enabled() and inputs.weight_oi.requires_grad):
        return "oneDNN is for training"
    return _product_refuses(inputs)


def _product_refuses(inputs: LinearInputs) -> str | None:
    """The reason why not, if any. What does not fit together is torch's to complain about."""
    x, weight_oi = inputs
    if not HAS_OPERATOR:
        return "this torch has no mkldnn::_linear_pointwise"
    if not x.dtype == weight_oi.dtype == torch.float32:
        return f"products of {x.dtype} and {weight_oi.dtype}"
    if x.dim() < 2 or x.numel() == 0 or x.shape[-1] != weight_oi.shape[1]:
        return "shapes that oneDNN does not take"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


@torch.no_grad()
def _product(inputs: LinearInputs) -> Tensor:
    return onednn(*inputs)


linear = Path[LinearInputs, Tensor](lambda inputs: _Linear.apply(*inputs), _refuses, TOLERANCE)
product = Path(_product, _product_refuses, TOLERANCE)

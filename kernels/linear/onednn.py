"""Products by oneDNN, which is part of torch: Inductor calls the same operator, torch.nn.functional.linear does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear import cpp_op

HAS_OPERATOR = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def serves(x: Tensor, weight_oi: Tensor) -> bool:
    """Whether it takes these; what does not fit together is torch's to complain about.

    oneDNN prepares each new shape, so it is for training, where shapes come again.
    """
    return (
        HAS_OPERATOR
        and x.dtype == weight_oi.dtype == torch.float32
        and x.dim() > 1
        and x.numel() > 0
        and x.shape[-1] == weight_oi.shape[1]
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight_oi: Tensor) -> Tensor:
    """See kernels.linear."""
    y: Tensor = _Linear.apply(x, weight_oi)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_oi)
        return product(x, weight_oi)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_oi = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = product(grad_y, weight_oi.t()) if wants_x else None
        if not wants_weight:
            return grad_x, None
        grad_weight_oi = torch.empty_like(weight_oi, memory_format=torch.contiguous_format)
        cpp_op.weight_gradient_(grad_weight_oi, _rows(grad_y), _rows(x), add=False)  # oneDNN is slow at these
        return grad_x, grad_weight_oi


def product(x: Tensor, weight_oi: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_oi, None, "none", [], "")
    return y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

"""The three products of a projection in training, each in one place: of rows and of gradients, by torch's BLAS."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that torch's own products would compute in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def of_rows(x_ri: Tensor, weight_oi: Tensor) -> Tensor:
    """y_ro."""
    return x_ri @ weight_oi.t()


def gradient_of_rows(grad_ro: Tensor, weight_oi: Tensor) -> Tensor:
    """That of x_ri."""
    return grad_ro @ weight_oi


def gradient_of_weight(grad_ro: Tensor, x_ri: Tensor) -> Tensor:
    """That of weight_oi, in the dtype of both."""
    return grad_ro.t() @ x_ri


def precise_gradient_of_weight(grad_ro: Tensor, x_ri: Tensor, dtype: torch.dtype) -> Tensor:
    """That of weight_oi in a dtype; not rounded to another before, where torch can."""
    if dtype == torch.float32 != x_ri.dtype and x_ri.is_cuda:
        return torch.mm(grad_ro.t(), x_ri, out_dtype=dtype)
    return gradient_of_weight(grad_ro, x_ri).to(dtype)

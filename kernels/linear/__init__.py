"""Products with a weight matrix: most of what a training step on a CPU computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.linear import onednn

__all__ = ["linear", "product"]


def linear(x: Tensor, weight_oi: Tensor) -> Tensor:
    """x W^T over the last dimension: a projection without bias.

    Args: x: [..., i].  weight_oi: [o, i].
    Raises: RuntimeError: the last dimension of x is not i.
    """
    if torch.is_grad_enabled() and weight_oi.requires_grad and _by_onednn(x, weight_oi):
        return onednn.linear(x, weight_oi)
    return F.linear(x, weight_oi)


def product(x: Tensor, weight_oi: Tensor) -> Tensor:
    """As linear, for shapes that come again and again. No gradient passes."""
    with torch.no_grad():
        return onednn.product(x, weight_oi) if _by_onednn(x, weight_oi) else F.linear(x, weight_oi)


def _by_onednn(x: Tensor, weight_oi: Tensor) -> bool:
    return onednn.serves(x, weight_oi) and dispatch.chosen(x) == "cpp"

"""Products with a weight matrix: most of what a training step on a CPU computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.linear import cpp_op, onednn

__all__ = ["linear", "product", "weight_gradient_"]


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


def weight_gradient_(out_oi: Tensor, grad_y: Tensor, x: Tensor, add: bool) -> None:
    """out = grad_y^T x, or out += grad_y^T x where `add`: the gradient of the weight in y = x W^T.

    Args: out_oi: [o, i].  grad_y: [rows, o].  x: [rows, i]; all of one dtype.
    Raises: ValueError, RuntimeError: the shapes do not fit together.
    """
    with torch.no_grad():
        if dispatch.chosen(x) == "cpp" and x.shape[0] > 0 and out_oi.stride(-1) == 1:
            cpp_op.weight_gradient_(out_oi, grad_y, x, add)
        else:
            out_oi.addmm_(grad_y.t(), x, beta=int(add))  # beta 0: what out holds is not read, so it may be anything


def _by_onednn(x: Tensor, weight_oi: Tensor) -> bool:
    return onednn.serves(x, weight_oi) and dispatch.chosen(x) == "cpp"

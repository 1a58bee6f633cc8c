"""A projection without bias: most of what a training step on a CPU computes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.linear import onednn

__all__ = ["linear"]


def linear(x: Tensor, weight_oi: Tensor) -> Tensor:
    """x W^T over the last dimension.

    Args: x: [..., i].  weight_oi: [o, i].
    Raises: RuntimeError: the last dimension of x is not i.
    """
    if onednn.pays(x, weight_oi) and dispatch.chosen(x) == "cpp":
        return onednn.linear(x, weight_oi)
    return F.linear(x, weight_oi)

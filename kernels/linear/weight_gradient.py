"""The gradient of a weight, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import rows_contiguous
from kernels.operator import check_request


@torch.no_grad()
def weight_gradient_(out_oi: Tensor, grad_y: Tensor, x: Tensor, add: bool) -> None:
    """out = grad_y^T x, or out += grad_y^T x if `add`: the gradient of the weight in y = x W^T.

    Args: out_oi: [o, i].  grad_y: [rows, o].  x: [rows, i]; all of one dtype.
    Raises: ValueError, RuntimeError: the shapes do not fit together.
    """
    in_cpp = check_request(x) in (None, "cpp") and library.refuses(x) is None
    if not in_cpp or x.shape[0] == 0 or out_oi.stride(-1) != 1:
        out_oi.addmm_(grad_y.t(), x, beta=int(add))  # beta 0: what out holds is not read, so it may be anything
        return
    rows = x.shape[0]
    library.require_shapes(grad_y=(grad_y, (rows, out_oi.shape[0])), x=(x, (rows, out_oi.shape[1])))
    library.call("weight_gradient", x.dtype, rows_contiguous(grad_y), rows_contiguous(x), out_oi, int(add))

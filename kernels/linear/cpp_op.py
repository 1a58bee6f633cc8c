"""The C++ path of a weight's gradient."""

from __future__ import annotations

from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import rows_contiguous


def weight_gradient_(out_oi: Tensor, grad_y: Tensor, x: Tensor, add: bool) -> None:
    """See kernels.linear; all are of one dtype, and rows of out_oi are contiguous."""
    rows = x.shape[0]
    library.require_shapes(grad_y=(grad_y, (rows, out_oi.shape[0])), x=(x, (rows, out_oi.shape[1])))
    library.call("weight_gradient", x.dtype, rows_contiguous(grad_y), rows_contiguous(x), out_oi, int(add))

"""The SSD scan and its decoding step by the C++ kernels: shapes, memory, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpp import library
from kernels.cpp.constants import SSD_CHUNK
from kernels.cpp.library import require_shapes, rows_contiguous, whole_vectors


class SSDScanCpp(torch.autograd.Function):
    """Arguments and results as in kernels.ssd_scan; inputs of one dtype."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, initial, doc_ids = (None if m is None else rows_contiguous(m) for m in inputs)
        assert x is not None
        assert B is not None
        (b, t, h, p), n = x.shape, B.shape[3]
        y_bthp, final_bhpn = x.new_empty(x.shape), x.new_empty(b, h, p, n)
        states_bchpn = x.new_empty(b, -(-t // SSD_CHUNK), h, p, whole_vectors(n))
        saved = (x, dt, A, B, C, D, initial, doc_ids, states_bchpn)
        library.call("ssd_scan_forward", x.dtype, *saved[:-1], y_bthp, states_bchpn, final_bhpn)
        ctx.save_for_backward(*saved)
        return y_bthp, final_bhpn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dy_bthp, dfinal_bhpn = (rows_contiguous(m) for m in grad_outputs)
        *inputs, initial = saved[:7]
        grads = [m.new_empty(m.shape) for m in inputs]
        dinitial = None if initial is None else initial.new_empty(initial.shape)
        dstates_bchpn = torch.empty_like(saved[-1])
        library.call("ssd_scan_backward", dy_bthp.dtype, *saved, dy_bthp, dfinal_bhpn, dstates_bchpn, *grads, dinitial)
        return *grads, dinitial, None


def ssd_scan_cpp(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_h: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_h: Tensor,
    initial_bhpn: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See kernels.ssd_scan. Raises: ValueError: a shape that does not go with those of x and B."""
    (b, t, h, p), (g, n) = x_bthp.shape, B_btgn.shape[2:]
    require_shapes(
        dt=(dt_bth, (b, t, h)), A=(A_h, (h,)), B=(B_btgn, (b, t, g, n)), C=(C_btgn, (b, t, g, n)), D=(D_h, (h,))
    )
    require_shapes(initial=(initial_bhpn, (b, h, p, n)), doc_ids=(doc_ids_bt, (b, t)))
    dtype = x_bthp.dtype
    inputs = (None if m is None else m.to(dtype) for m in (x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn))
    docs = None if doc_ids_bt is None else doc_ids_bt.to(torch.int64)
    y_bthp, state_bhpn = SSDScanCpp.apply(*inputs, docs)
    return y_bthp, state_bhpn


def serves_step(x_bhp: Tensor, state_bhpn: Tensor) -> bool:
    """Whether the step's kernel can update this state in place."""
    return x_bhp.dtype == state_bhpn.dtype and state_bhpn.stride(-1) == 1


def ssd_step_cpp(
    x_bhp: Tensor, dt_bh: Tensor, A_h: Tensor, B_bgn: Tensor, C_bgn: Tensor, D_h: Tensor, state_bhpn: Tensor
) -> Tensor:
    """See kernels.ssd_scan.ssd_step. Raises: ValueError: a shape that does not go with those of x and B."""
    (b, h, p), (g, n) = x_bhp.shape, B_bgn.shape[1:]
    require_shapes(dt=(dt_bh, (b, h)), A=(A_h, (h,)), B=(B_bgn, (b, g, n)), C=(C_bgn, (b, g, n)), D=(D_h, (h,)))
    require_shapes(state=(state_bhpn, (b, h, p, n)))
    dtype, y_bhp = x_bhp.dtype, torch.empty(x_bhp.shape, dtype=x_bhp.dtype)
    inputs = (m if m.dtype == dtype else m.to(dtype) for m in (x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h))
    library.call("ssd_step", dtype, *map(rows_contiguous, inputs), state_bhpn, y_bhp)
    return y_bhp

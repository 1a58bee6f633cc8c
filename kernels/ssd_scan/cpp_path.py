"""The SSD scan and its decoding step in C++: shapes, memory, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.constants import SSD_CHUNK
from kernels.cpp.library import require_shapes, rows_contiguous, whole_vectors
from kernels.operator import Kept, Path, Saved, differentiable
from kernels.ssd_scan.reference import ScanInputs, ScanOutputs, StepInputs, rates

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def _forward(*inputs: Any, save: bool) -> Kept[tuple[Tensor, Tensor]]:
    """Inputs of one dtype."""
    readable = tuple(None if m is None else rows_contiguous(m) for m in inputs)
    x, B = inputs[0], inputs[3]
    (b, t, h, p), n = x.shape, B.shape[3]
    y_bthp, final_bhpn = x.new_empty(x.shape), x.new_empty(b, h, p, n)
    states_bchpn = x.new_empty(b, -(-t // SSD_CHUNK), h, p, whole_vectors(n))
    library.call("ssd_scan_forward", x.dtype, *readable, y_bthp, states_bchpn, final_bhpn)
    return (y_bthp, final_bhpn), (*readable, states_bchpn), ()


def _backward(saved: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dy_bthp, dfinal_bhpn = (rows_contiguous(m) for m in grads)
    *inputs, _, states_bchpn = saved.tensors
    assert states_bchpn is not None
    dinputs = [None if m is None else m.new_empty(m.shape) for m in inputs]
    dstates_bchpn = torch.empty_like(states_bchpn)
    operands = (*saved.tensors, dy_bthp, dfinal_bhpn, dstates_bchpn, *dinputs)
    library.call("ssd_scan_backward", dy_bthp.dtype, *operands)
    return *dinputs, None


_scan = differentiable(_forward, _backward)


def _run(inputs: ScanInputs) -> ScanOutputs:
    """Raise ValueError if a shape does not go with those of x and B."""
    x, dt, A, B, C, D, initial, doc_ids = inputs
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    require_shapes(dt=(dt, (b, t, h)), A=(A, (h,)), B=(B, (b, t, g, n)), C=(C, (b, t, g, n)), D=(D, (h,)))
    require_shapes(initial=(initial, (b, h, p, n)), doc_ids=(doc_ids, (b, t)))
    same = (None if m is None else m.to(x.dtype) for m in inputs[:-1])
    return ScanOutputs(*_scan(*same, None if doc_ids is None else doc_ids.to(torch.int64)))


ssd_scan = Path(_run, tolerance=TOLERANCE)


def _step_refuses(inputs: StepInputs) -> str | None:
    state = inputs.state_bhpn
    if inputs.x_bhp.dtype != state.dtype:
        return f"x of {inputs.x_bhp.dtype} and a state of {state.dtype}"
    return None if state.stride(-1) == 1 else "a state whose rows are not contiguous"


def _run_step(inputs: StepInputs) -> Tensor:
    """Raise ValueError if a shape does not go with those of x and B."""
    x, dt, dt_bias, A_log, B, C, D, state = inputs
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    require_shapes(dt=(dt, (b, h)), dt_bias=(dt_bias, (h,)), A_log=(A_log, (h,)), D=(D, (h,)))
    require_shapes(B=(B, (b, g, n)), C=(C, (b, g, n)))
    require_shapes(state=(state, (b, h, p, n)))
    dtype, y_bhp = x.dtype, torch.empty(x.shape, dtype=x.dtype)
    same = (m if m.dtype == dtype else m.to(dtype) for m in (x, *rates(inputs), B, C, D))
    library.call("ssd_step", dtype, *map(rows_contiguous, same), state, y_bhp)
    return y_bhp


ssd_step = Path(_run_step, _step_refuses, TOLERANCE)

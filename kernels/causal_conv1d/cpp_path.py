"""The causal convolution and its decoding step in C++: shapes, memory, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.causal_conv1d.reference import ConvInputs, ConvOutputs, StepInputs, tail
from kernels.cpp import library
from kernels.cpp.constants import CONV_MAX_WIDTH, CONV_PART_POSITIONS
from kernels.cpp.library import rows_contiguous
from kernels.operator import Kept, Path, Saved, differentiable

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def _forward(*inputs: Tensor | None, save: bool) -> Kept[Tensor]:
    x, weight_dk, initial, doc_ids = (None if m is None else rows_contiguous(m) for m in inputs)
    assert x is not None
    y_btd = x.new_empty(x.shape)
    library.call("causal_conv1d_forward", x.dtype, x, weight_dk, initial, doc_ids, y_btd)
    return y_btd, (x, weight_dk, initial, doc_ids), ()


def _backward(saved: Saved, grad_y_btd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_dk, initial, doc_ids = saved.tensors
    assert x is not None
    assert weight_dk is not None
    dx, dweight_dk = x.new_empty(x.shape), weight_dk.new_empty(weight_dk.shape)
    parts, (d, width) = x.shape[0] * -(-x.shape[1] // CONV_PART_POSITIONS), weight_dk.shape
    dweight_skd = x.new_empty(parts, width, d)
    operands = (x, weight_dk, initial, doc_ids, rows_contiguous(grad_y_btd))
    library.call("causal_conv1d_backward", x.dtype, *operands, dx, dweight_skd, dweight_dk)
    return dx, dweight_dk, None, None


_convolve = differentiable(_forward, _backward)


def _refuses(inputs: ConvInputs) -> str | None:
    width = inputs.weight_dk.shape[1]
    return f"{width} taps, more than {CONV_MAX_WIDTH}" if width > CONV_MAX_WIDTH else None


def _run(inputs: ConvInputs) -> ConvOutputs:
    """Raise ValueError if a shape does not go with that of x."""
    x_btd, weight_dk, initial_btd, doc_ids_bt = inputs
    (b, t, d), (channels, width) = x_btd.shape, weight_dk.shape
    if channels != d:
        raise ValueError(f"x has {d} channels, but weight_dk has {channels}.")
    if initial_btd is not None and (initial_btd.shape[::2] != (b, d) or initial_btd.shape[1] < width - 1):
        raise ValueError(f"initial_btd has shape {tuple(initial_btd.shape)}, expected {(b, width - 1, d)}.")
    if doc_ids_bt is not None and doc_ids_bt.shape != (b, t):
        raise ValueError(f"doc_ids_bt has shape {tuple(doc_ids_bt.shape)}, expected {(b, t)}.")
    initial = None if initial_btd is None else initial_btd.to(x_btd.dtype)
    docs = None if doc_ids_bt is None else doc_ids_bt.to(torch.int64)
    return ConvOutputs(_convolve(x_btd, weight_dk.to(x_btd.dtype), initial, docs), tail(inputs))


causal_conv1d = Path(_run, _refuses, TOLERANCE)


def _step_refuses(inputs: StepInputs) -> str | None:
    x_bd, weight_dk, state_bkd = inputs
    if not x_bd.dtype == weight_dk.dtype == state_bkd.dtype:
        return f"x, weight and state of {x_bd.dtype}, {weight_dk.dtype} and {state_bkd.dtype}"
    return None if state_bkd.stride(-1) == 1 else "a state whose rows are not contiguous"


def _run_step(inputs: StepInputs) -> Tensor:
    """Raise ValueError if shapes do not go together."""
    x_bd, weight_dk, state_bkd = inputs
    (b, d), past = x_bd.shape, weight_dk.shape[1] - 1
    if weight_dk.shape[0] != d or state_bkd.shape != (b, past, d):
        raise ValueError(
            f"weight_dk has shape {tuple(weight_dk.shape)} and state_bkd {tuple(state_bkd.shape)}, "
            f"expected {(d, past + 1)} and {(b, past, d)}."
        )
    y_bd = torch.empty(x_bd.shape, dtype=x_bd.dtype)
    library.call("causal_conv1d_step", x_bd.dtype, rows_contiguous(x_bd), weight_dk, state_bkd, y_bd)
    return y_bd


causal_conv1d_step = Path(_run_step, _step_refuses, TOLERANCE)

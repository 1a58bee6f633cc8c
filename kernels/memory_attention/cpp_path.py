"""Memory attention and its decoding step in C++: shapes, memory, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import require_shapes, rows_contiguous, whole_vectors
from kernels.memory_attention.reference import AttentionInputs, FlatInputs, StepInputs
from kernels.operator import Kept, Path, Saved, differentiable
from kernels.shapes_only import is_shapes_only

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
SPAN = 1024  # queries whose gradients by keys are added up together, at least; spans are what threads share


def _forward(*given: Any, save: bool) -> Kept[Tensor]:
    inputs = FlatInputs(*given)
    dtype, own_values = inputs.q.dtype, inputs.eidetic_v is not None
    readable = [None if x is None else rows_contiguous(x.to(dtype)) for x in inputs.sets]
    selected = [None if x is None else x.to(torch.int64) for x in (inputs.index_bjm, inputs.doc_ids_bt)]
    inputs = FlatInputs.from_saved((*readable, *selected), inputs.numbers)
    if inputs.index_bjm is not None and not own_values:
        inputs = inputs._replace(eidetic_v=inputs.v)
    _check(inputs)
    q = inputs.q
    out_bthp, log_sum_bht = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    numbers = (inputs.window_size, inputs.chunk_size, inputs.num_past)
    library.call("memory_attention_forward", dtype, *inputs.tensors, out_bthp, log_sum_bht, *numbers)
    return out_bthp, (*inputs.tensors, out_bthp, log_sum_bht), (own_values, inputs.numbers)


def _backward(saved: Saved, grad_out_bthp: Tensor) -> tuple[Tensor | None, ...]:
    (*tensors, out_bthp, log_sum_bht), (own_values, numbers) = saved
    inputs = FlatInputs.from_saved(tensors, numbers)
    q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v, index = inputs[:9]
    (b, t, h), width = q.shape[:3], whole_vectors(q.shape[3])
    span = _span(inputs)
    reach = min(inputs.window_size, max(x.shape[1] for x in (k, fading_k) if x is not None))
    rows = (2 if fading_k is None else 4) * (span + reach - 1)
    near_bhlxrp = q.new_empty(b, h, -(-t // span), rows, width)
    slots_bhjxmp = None if index is None else q.new_empty(b, h, *index.shape[1:2], 2, index.shape[2] * width)
    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, fading_k, fading_v)]
    grads += [None if x is None else torch.empty_like(x) for x in (eidetic_q, eidetic_k)]
    grad_eidetic_v = None if eidetic_v is None or not own_values else torch.empty_like(eidetic_v)
    library.call(
        "memory_attention_backward",
        q.dtype,
        *inputs.tensors,
        out_bthp,
        log_sum_bht,
        rows_contiguous(grad_out_bthp),
        *grads,
        grads[2] if grad_eidetic_v is None else grad_eidetic_v,
        near_bhlxrp,
        slots_bhjxmp,
        inputs.window_size,
        inputs.chunk_size,
        inputs.num_past,
        span,
        reach,
    )
    return *grads, grad_eidetic_v, None, None, *(None for _ in numbers)


_attend = differentiable(_forward, _backward)


def _run(inputs: AttentionInputs) -> Tensor:
    """Raises: ValueError: shapes, or IndexError: rows, that do not fit together."""
    out_bthp: Tensor = _attend(*FlatInputs.of(inputs))
    return out_bthp


def _run_step(inputs: StepInputs) -> Tensor:
    """Raises: ValueError: shapes that do not fit together."""
    q_bhp, k_brhp, v_brhp, position_b, fading, eidetic, window_size = inputs
    (b, heads, p), kv_heads, dtype = q_bhp.shape, k_brhp.shape[2], q_bhp.dtype
    _require_groups(heads, kv_heads)
    fading_k, fading_v = fading or (None, None)
    far_q, slot_k, slot_v, slot_position = eidetic or (None,) * 4

    def rows_of(x: Tensor | None) -> tuple[int, ...]:
        return b, 0 if x is None else x.shape[1], kv_heads, p

    require_shapes(
        k_brhp=(k_brhp, rows_of(k_brhp)),
        v_brhp=(v_brhp, rows_of(k_brhp)),
        position_b=(position_b, (b,)),
        fading_k=(fading_k, rows_of(fading_k)),
        fading_v=(fading_v, rows_of(fading_k)),
        eidetic_q=(far_q, (b, heads, p)),
        slot_k=(slot_k, rows_of(slot_k)),
        slot_v=(slot_v, rows_of(slot_k)),
        slot_position=(slot_position, rows_of(slot_k)[:2]),
    )
    operands = (q_bhp, k_brhp, v_brhp, fading_k, fading_v, far_q, slot_k, slot_v)
    readable = [None if x is None else rows_contiguous(x.to(dtype)) for x in operands]
    positions = [None if x is None else x.to(torch.int64) for x in (slot_position, position_b)]
    out_bhp = torch.empty(q_bhp.shape, dtype=dtype)
    window_size = window_size or k_brhp.shape[1]
    library.call("memory_attention_step", dtype, *readable, *positions, out_bhp, window_size)
    return out_bhp


memory_attention = Path(_run, tolerance=TOLERANCE)
memory_attention_step = Path(_run_step, tolerance=TOLERANCE)


def _span(inputs: FlatInputs) -> int:
    """Whole chunks if they have slots, so that those of a chunk are added up in one place; no fewer queries than
    the window has, so that what spans share stays small beside what they have of their own."""
    unit = 1 if inputs.index_bjm is None else inputs.chunk_size
    return -(-min(max(SPAN, inputs.window_size), inputs.num_queries) // unit) * unit


def _check(inputs: FlatInputs) -> None:
    """Raise ValueError if shapes, IndexError if rows, which the kernels trust, do not fit together."""
    b, _, heads, p = inputs.q.shape
    kv_heads, index = inputs.k.shape[2], inputs.index_bjm

    def rows_of(x: Tensor | None) -> tuple[int, ...]:
        return b, 0 if x is None else x.shape[1], kv_heads, p

    require_shapes(
        k=(inputs.k, rows_of(inputs.k)),
        v=(inputs.v, rows_of(inputs.k)),
        fading_k=(inputs.fading_k, rows_of(inputs.fading_k)),
        fading_v=(inputs.fading_v, rows_of(inputs.fading_k)),
        eidetic_q=(inputs.eidetic_q, tuple(inputs.q.shape)),
        eidetic_k=(inputs.eidetic_k, rows_of(inputs.eidetic_k)),
        eidetic_v=(inputs.eidetic_v, rows_of(inputs.eidetic_k)),
        doc_ids_bt=(inputs.doc_ids_bt, (b, inputs.num_queries)),
        index_bjm=(index, (b, *(() if index is None else index.shape[1:]))),
    )
    _require_groups(heads, kv_heads)
    if index is not None and inputs.eidetic_k is not None and index.numel() and not is_shapes_only():
        highest, rows = int(index.max()), inputs.eidetic_k.shape[1]
        if highest >= rows:
            raise IndexError(f"index_bjm names row {highest} of {rows} eidetic rows.")


def _require_groups(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of the {kv_heads} key/value heads.")

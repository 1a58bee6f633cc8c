"""Memory attention by the C++ kernels: shapes, memory, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.memory_attention.layout import Geometry

SPAN = 512  # queries whose gradients by keys are added up together, at least; spans are what threads share
WIDEST_VECTOR = 16  # elements; rows that the kernels add up are whole vectors


class MemoryAttentionCpp(torch.autograd.Function):
    """inputs: q, window k and v, fading k and v, eidetic q, k and v as in kernels.memory_attention, None where there
    is no such set; an eidetic v of None stands for the window's."""

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, index_bjm: Tensor | None, doc_ids_bt: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        dtype = _given(inputs[0]).dtype
        readable = [None if x is None else _rows_contiguous(x.to(dtype)) for x in inputs]
        q, *_, eidetic_v = readable
        assert q is not None
        if index_bjm is not None and eidetic_v is None:
            readable[-1] = readable[2]
        out_bthp = q.new_empty(q.shape)
        log_sum_bht = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        selected = tuple(None if x is None else x.to(torch.int64) for x in (index_bjm, doc_ids_bt))
        library.call(
            "memory_attention_forward", dtype, *readable, *selected, out_bthp, log_sum_bht,
            geometry.window_size, geometry.chunk_size, geometry.num_past,
        )  # fmt: skip
        ctx.save_for_backward(*readable, *selected, out_bthp, log_sum_bht)
        ctx.geometry, ctx.own_values = geometry, eidetic_v is not None
        return out_bthp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        geometry: Geometry = ctx.geometry
        q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v, index_bjm, doc_ids_bt, out, log_sum = (
            ctx.saved_tensors
        )
        with_fading, with_slots = fading_k is not None, index_bjm is not None
        (b, t, h), width = q.shape[:3], -(-q.shape[3] // WIDEST_VECTOR) * WIDEST_VECTOR
        span = _span(geometry, with_slots)
        rows = (4 if with_fading else 2) * (span + geometry.window_size - 1)
        near_bhlxrp = q.new_zeros(b, h, -(-t // span), rows, width)
        slots_bhjxmp = q.new_zeros(b, h, *index_bjm.shape[1:2], 2, index_bjm.shape[2] * width) if with_slots else None
        grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, fading_k, fading_v)]
        grads += [torch.empty_like(eidetic_q), torch.zeros_like(eidetic_k)] if with_slots else [None, None]
        grad_eidetic_v = torch.zeros_like(eidetic_v) if ctx.own_values else None
        library.call(
            "memory_attention_backward", q.dtype,
            q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v, index_bjm, doc_ids_bt, out, log_sum,
            _rows_contiguous(grad_outputs[0]), *grads, grads[2] if grad_eidetic_v is None else grad_eidetic_v,
            near_bhlxrp, slots_bhjxmp, geometry.window_size, geometry.chunk_size, geometry.num_past, span,
        )  # fmt: skip
        return None, None, None, *grads, grad_eidetic_v


def memory_attention_step_cpp(
    q_bhp: Tensor,
    k_brhp: Tensor,
    v_brhp: Tensor,
    fading: tuple[Tensor, Tensor] | None = None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    window_size: int,
    position_b: Tensor,
) -> Tensor:
    """See kernels.memory_attention.memory_attention_step. Without gradient."""
    far_q, slot_k, slot_v, slot_position = eidetic or (None,) * 4
    operands = (q_bhp, k_brhp, v_brhp, *(fading or (None, None)), far_q, slot_k, slot_v)
    dtype = q_bhp.dtype
    readable = [None if x is None else _rows_contiguous(x.detach().to(dtype)) for x in operands]
    out_bhp = torch.empty(q_bhp.shape, dtype=dtype)
    library.call("memory_attention_step", dtype, *readable, slot_position, position_b, out_bhp, window_size)
    return out_bhp


def _span(geometry: Geometry, with_slots: bool) -> int:
    """Whole chunks where they have slots, so that those of a chunk are added up in one place; no fewer queries than
    the window has, so that what spans share stays small beside what they have of their own."""
    unit = geometry.chunk_size if with_slots else 1
    return -(-min(max(SPAN, geometry.window_size), geometry.num_queries) // unit) * unit


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x

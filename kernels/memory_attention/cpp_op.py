"""Memory attention by the C++ kernels: shapes, memory, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpp import library
from kernels.cpp.library import require_shapes, rows_contiguous, whole_vectors
from kernels.memory_attention.layout import Geometry

SPAN = 1024  # queries whose gradients by keys are added up together, at least; spans are what threads share


class MemoryAttentionCpp(torch.autograd.Function):
    """inputs: q, window k and v, fading k and v, eidetic q, k and v as in kernels.memory_attention, None where there
    is no such set; an eidetic v of None stands for the window's."""

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, index_bjm: Tensor | None, doc_ids_bt: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        dtype = _given(inputs[0]).dtype
        readable = [None if x is None else rows_contiguous(x.to(dtype)) for x in inputs]
        if index_bjm is not None and inputs[-1] is None:
            readable[-1] = readable[2]
        _check(geometry, index_bjm, doc_ids_bt, *readable)
        q = _given(readable[0])
        out_bthp, log_sum_bht = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        selected = [None if x is None else x.to(torch.int64) for x in (index_bjm, doc_ids_bt)]
        library.call(
            "memory_attention_forward", dtype, *readable, *selected, out_bthp, log_sum_bht,
            geometry.window_size, geometry.chunk_size, geometry.num_past,
        )  # fmt: skip
        ctx.save_for_backward(*readable, *selected, out_bthp, log_sum_bht)
        ctx.geometry, ctx.own_values = geometry, inputs[-1] is not None
        return out_bthp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        geometry: Geometry = ctx.geometry
        q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v, index_bjm, doc_ids_bt, out, log_sum = (
            ctx.saved_tensors
        )
        with_fading, with_slots = fading_k is not None, index_bjm is not None
        (b, t, h), width = q.shape[:3], whole_vectors(q.shape[3])
        span = _span(geometry, with_slots)
        reach = min(geometry.window_size, max(x.shape[1] for x in (k, fading_k) if x is not None))
        rows = (4 if with_fading else 2) * (span + reach - 1)
        near_bhlxrp = q.new_empty(b, h, -(-t // span), rows, width)
        slots_bhjxmp = q.new_empty(b, h, *index_bjm.shape[1:2], 2, index_bjm.shape[2] * width) if with_slots else None
        grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, fading_k, fading_v)]
        grads += [torch.empty_like(eidetic_q), torch.empty_like(eidetic_k)] if with_slots else [None, None]
        grad_eidetic_v = torch.empty_like(eidetic_v) if ctx.own_values else None
        library.call(
            "memory_attention_backward", q.dtype,
            q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v, index_bjm, doc_ids_bt, out, log_sum,
            rows_contiguous(grad_outputs[0]), *grads, grads[2] if grad_eidetic_v is None else grad_eidetic_v,
            near_bhlxrp, slots_bhjxmp, geometry.window_size, geometry.chunk_size, geometry.num_past, span, reach,
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
    (b, heads, p), kv_heads, dtype = q_bhp.shape, k_brhp.shape[2], q_bhp.dtype
    _require_groups(heads, kv_heads)
    fading_k, fading_v = fading or (None, None)
    far_q, slot_k, slot_v, slot_position = eidetic or (None,) * 4

    def rows_of(x: Tensor | None) -> tuple[int, ...]:
        return b, 0 if x is None else x.shape[1], kv_heads, p

    require_shapes(
        k_brhp=(k_brhp, rows_of(k_brhp)), v_brhp=(v_brhp, rows_of(k_brhp)), position_b=(position_b, (b,)),
        fading_k=(fading_k, rows_of(fading_k)), fading_v=(fading_v, rows_of(fading_k)),
        eidetic_q=(far_q, (b, heads, p)), slot_k=(slot_k, rows_of(slot_k)), slot_v=(slot_v, rows_of(slot_k)),
        slot_position=(slot_position, rows_of(slot_k)[:2]),
    )  # fmt: skip
    operands = (q_bhp, k_brhp, v_brhp, fading_k, fading_v, far_q, slot_k, slot_v)
    readable = [None if x is None else rows_contiguous(x.to(dtype)) for x in operands]
    out_bhp = torch.empty(q_bhp.shape, dtype=dtype)
    slot_position = None if slot_position is None else slot_position.to(torch.int64)
    position_b = position_b.to(torch.int64)
    library.call("memory_attention_step", dtype, *readable, slot_position, position_b, out_bhp, window_size)
    return out_bhp


def _span(geometry: Geometry, with_slots: bool) -> int:
    """Whole chunks where they have slots, so that those of a chunk are added up in one place; no fewer queries than
    the window has, so that what spans share stays small beside what they have of their own."""
    unit = geometry.chunk_size if with_slots else 1
    return -(-min(max(SPAN, geometry.window_size), geometry.num_queries) // unit) * unit


def _check(geometry: Geometry, index_bjm: Tensor | None, doc_ids_bt: Tensor | None, *inputs: Tensor | None) -> None:
    """The kernels trust shapes and rows. Raises: ValueError: shapes, or IndexError: rows, that do not fit together."""
    q, k, v, fading_k, fading_v, eidetic_q, eidetic_k, eidetic_v = inputs
    b, _, heads, p = _given(q).shape
    kv_heads = _given(k).shape[2]

    def rows_of(x: Tensor | None) -> tuple[int, ...]:
        return b, 0 if x is None else x.shape[1], kv_heads, p

    require_shapes(
        k=(k, rows_of(k)), v=(v, rows_of(k)), fading_k=(fading_k, rows_of(fading_k)),
        fading_v=(fading_v, rows_of(fading_k)), eidetic_q=(eidetic_q, tuple(_given(q).shape)),
        eidetic_k=(eidetic_k, rows_of(eidetic_k)), eidetic_v=(eidetic_v, rows_of(eidetic_k)),
        doc_ids_bt=(doc_ids_bt, (b, geometry.num_queries)),
        index_bjm=(index_bjm, (b, *(() if index_bjm is None else index_bjm.shape[1:]))),
    )  # fmt: skip
    _require_groups(heads, kv_heads)
    if index_bjm is not None and index_bjm.numel():
        highest, rows = int(index_bjm.max()), _given(eidetic_k).shape[1]
        if highest >= rows:
            raise IndexError(f"index_bjm names row {highest} of {rows} eidetic rows.")


def _require_groups(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of the {kv_heads} key/value heads.")


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x

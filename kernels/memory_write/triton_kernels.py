"""Device code of a decoding step's rotations and ring writes: one head of one row per program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ring_size", "fading_ring_size"])
def memory_write_kernel(
    q_ptr, k_ptr, v_ptr, fading_k_ptr, fading_v_ptr, position_ptr, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr,
    ring_k_ptr, ring_v_ptr, ring_plain_ptr, ring_fading_k_ptr, ring_fading_v_ptr, out_ptr,
    q_strides, k_strides, v_strides, fading_k_strides, fading_v_strides,
    ring_k_strides, ring_v_strides, ring_plain_strides, ring_fading_k_strides, ring_fading_v_strides,
    far_out, ring_size, fading_ring_size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Strides are those of row and head, rings' those of row, slot and head. Grid: heads, b.

    out_ptr: [1 or 2, b, HEADS, P].  far_out: elements between its two parts.  HALF: P / 2, up to a power of two.
    """
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, HALF)
    exists = i < P // 2
    cos = tl.load(cos_ptr + batch * (P // 2) + i, mask=exists, other=0.0)
    sin = tl.load(sin_ptr + batch * (P // 2) + i, mask=exists, other=0.0)
    if head < HEADS:
        low, high = _load(q_ptr + batch * q_strides[0] + head * q_strides[1], i, exists, P)
        out = out_ptr + (batch * HEADS + head) * P
        _store(out, _turned(low, high, cos, sin), i, exists, P)
        if far_cos_ptr is not None:
            far_cos = tl.load(far_cos_ptr + i, mask=exists, other=0.0)
            far_sin = tl.load(far_sin_ptr + i, mask=exists, other=0.0)
            _store(out + far_out, _turned(low, high, far_cos, far_sin), i, exists, P)
    if head < KV_HEADS:
        position = tl.load(position_ptr + batch)
        slot = position % ring_size
        k = _load(k_ptr + batch * k_strides[0] + head * k_strides[1], i, exists, P)
        v = _load(v_ptr + batch * v_strides[0] + head * v_strides[1], i, exists, P)
        _store(_row(ring_k_ptr, ring_k_strides, batch, slot, head), _turned(k[0], k[1], cos, sin), i, exists, P)
        _store(_row(ring_v_ptr, ring_v_strides, batch, slot, head), v, i, exists, P)
        if ring_plain_ptr is not None:
            _store(_row(ring_plain_ptr, ring_plain_strides, batch, slot, head), k, i, exists, P)
        if ring_fading_k_ptr is not None:
            slot = position % fading_ring_size
            k = _load(fading_k_ptr + batch * fading_k_strides[0] + head * fading_k_strides[1], i, exists, P)
            v = _load(fading_v_ptr + batch * fading_v_strides[0] + head * fading_v_strides[1], i, exists, P)
            turned = _turned(k[0], k[1], cos, sin)
            _store(_row(ring_fading_k_ptr, ring_fading_k_strides, batch, slot, head), turned, i, exists, P)
            _store(_row(ring_fading_v_ptr, ring_fading_v_strides, batch, slot, head), v, i, exists, P)


@triton.jit
def _row(ring_ptr, strides, batch, slot, head):
    return ring_ptr + batch * strides[0] + slot * strides[1] + head * strides[2]


@triton.jit
def _load(ptr, i, exists, P: tl.constexpr):
    """The two halves of a row."""
    return tl.load(ptr + i, mask=exists, other=0.0), tl.load(ptr + P // 2 + i, mask=exists, other=0.0)


@triton.jit
def _store(ptr, halves, i, exists, P: tl.constexpr):
    tl.store(ptr + i, halves[0].to(ptr.dtype.element_ty), mask=exists)
    tl.store(ptr + P // 2 + i, halves[1].to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def _turned(low, high, cos, sin):
    """The halves rotated, in their own dtype."""
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    return (a * cos - b * sin).to(low.dtype), (b * cos + a * sin).to(low.dtype)

"""Device code of one decoding step of memory attention: one query per row, keys split over programs, then combined."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory_attention.triton_forward import UNSEEN, load_rows, load_slots, softmax_step


@triton.jit
def head_of(ptr, strides, batch, head):
    """Where one head of a [b, t, h, p] tensor starts; `batch` in 64 bits."""
    return ptr + batch * strides[0] + head * strides[2]


@triton.jit
def attend_ring(
    q_rp, out_rp, max_r, sum_r, k_ptr, v_ptr, k_stride, v_stride, position, age, window_size, ring_size, split,
    scale_log2, SPLITS: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """softmax_step over every SPLITS-th tile of the positions read; position i lies in slot i mod ring_size."""
    oldest = tl.maximum(position - tl.minimum(age + window_size, ring_size) + 1, 0)
    end = position - age + 1
    for start in range(oldest + split * BLOCK_K, end, SPLITS * BLOCK_K):
        position_n = start + tl.arange(0, BLOCK_K)
        exists_n = position_n < end
        slot_n = position_n % ring_size
        k_np = load_rows(k_ptr + slot_n.to(tl.int64) * k_stride, exists_n, P).to(q_rp.dtype)
        v_np = load_rows(v_ptr + slot_n.to(tl.int64) * v_stride, exists_n, P).to(q_rp.dtype)
        out_rp, max_r, sum_r = softmax_step(q_rp, k_np, v_np, exists_n[None, :], out_rp, max_r, sum_r, scale_log2)
    return out_rp, max_r, sum_r


@triton.jit(do_not_specialize=["window_size", "ring_size", "fading_ring_size"])
def step_kernel(
    q_ptr, k_ptr, v_ptr, fading_k_ptr, fading_v_ptr, eidetic_q_ptr, eidetic_k_ptr, eidetic_v_ptr,
    slot_position_ptr, position_ptr, part_out_ptr, part_max_ptr, part_sum_ptr, out_ptr,
    q_strides, k_strides, v_strides, fading_k_strides, fading_v_strides, eidetic_q_strides, eidetic_k_strides,
    eidetic_v_strides, num_heads, window_size, ring_size, fading_ring_size, scale_log2,
    NUM_SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One split's unnormalised output, maximum and denominator, [b, h, SPLITS, ...]; the output itself if there is one
    split. Grid: splits, kv heads, b.

    ROWS: the GROUP query heads that share a key/value head, filled up to the side of a matrix product.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(position_ptr + batch).to(tl.int32)
    row_r = tl.arange(0, ROWS)
    exists_r, head_r = row_r < GROUP, kv_head * GROUP + row_r
    out_rp = tl.zeros([ROWS, P], tl.float32)
    max_r = tl.full([ROWS], UNSEEN, tl.float32)
    sum_r = tl.zeros([ROWS], tl.float32)
    q_rp = load_rows(q_ptr + batch * q_strides[0] + head_r * q_strides[1], exists_r, P)
    out_rp, max_r, sum_r = attend_ring(
        q_rp, out_rp, max_r, sum_r,
        head_of(k_ptr, k_strides, batch, kv_head), head_of(v_ptr, v_strides, batch, kv_head),
        k_strides[1], v_strides[1], position, 0, window_size, ring_size, split, scale_log2, SPLITS, P, BLOCK_K,
    )  # fmt: skip
    if fading_k_ptr is not None:
        out_rp, max_r, sum_r = attend_ring(
            q_rp, out_rp, max_r, sum_r,
            head_of(fading_k_ptr, fading_k_strides, batch, kv_head),
            head_of(fading_v_ptr, fading_v_strides, batch, kv_head),
            fading_k_strides[1], fading_v_strides[1], position, window_size, window_size, fading_ring_size, split,
            scale_log2, SPLITS, P, BLOCK_K,
        )  # fmt: skip
    if eidetic_k_ptr is not None:
        q_rp = load_rows(eidetic_q_ptr + batch * eidetic_q_strides[0] + head_r * eidetic_q_strides[1], exists_r, P)
        eidetic_k_ptr = head_of(eidetic_k_ptr, eidetic_k_strides, batch, kv_head)
        eidetic_v_ptr = head_of(eidetic_v_ptr, eidetic_v_strides, batch, kv_head)
        for slot in range(split * BLOCK_K, NUM_SLOTS, SPLITS * BLOCK_K):
            _, full_n = load_slots(slot_position_ptr + batch * NUM_SLOTS, slot, NUM_SLOTS, BLOCK_K)
            slot_n = (slot + tl.arange(0, BLOCK_K)).to(tl.int64)
            k_np = load_rows(eidetic_k_ptr + slot_n * eidetic_k_strides[1], full_n, P).to(q_rp.dtype)
            v_np = load_rows(eidetic_v_ptr + slot_n * eidetic_v_strides[1], full_n, P).to(q_rp.dtype)
            out_rp, max_r, sum_r = softmax_step(q_rp, k_np, v_np, full_n[None, :], out_rp, max_r, sum_r, scale_log2)
    part_r = (batch * num_heads + head_r) * SPLITS + split
    at_rp = part_r[:, None] * P + tl.arange(0, P)[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + at_rp, (out_rp / sum_r[:, None]).to(out_ptr.dtype.element_ty), mask=exists_r[:, None])
    else:
        tl.store(part_out_ptr + at_rp, out_rp, mask=exists_r[:, None])
        tl.store(part_max_ptr + part_r, max_r, mask=exists_r)
        tl.store(part_sum_ptr + part_r, sum_r, mask=exists_r)


@triton.jit
def combine_kernel(part_out_ptr, part_max_ptr, part_sum_ptr, out_ptr, SPLITS: tl.constexpr, P: tl.constexpr):
    """The attention of one head from the parts of its splits. Grid: b x h."""
    head = tl.program_id(0).to(tl.int64)
    part_s = head * SPLITS + tl.arange(0, SPLITS)
    max_s = tl.load(part_max_ptr + part_s)
    weight_s = tl.math.exp2(max_s - tl.max(max_s, 0))
    out_sp = tl.load(part_out_ptr + part_s[:, None] * P + tl.arange(0, P)[None, :])
    total_p = tl.sum(out_sp * weight_s[:, None], 0)
    out_p = total_p / tl.sum(tl.load(part_sum_ptr + part_s) * weight_s, 0)
    tl.store(out_ptr + head * P + tl.arange(0, P), out_p.to(out_ptr.dtype.element_ty))

"""Device code of memory attention: how tiles cover the three sets, and the forward pass.

A query tile holds BLOCK_Q rows: BLOCK_Q // GROUP positions of one chunk, times the GROUP query heads that share a
key/value head, so that a key read once serves them all. Positions count from the first query's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.triton_math import dot

UNSEEN = tl.constexpr(-1e30)  # a maximum over no scores; finite, because -inf - -inf is not 0


@triton.jit
def head_of(ptr, strides, batch, head):
    """Where one head of a [b, t, h, p] tensor starts."""
    return ptr + batch * strides[0] + head * strides[2]


@triton.jit
def load_rows(ptr, offset_r, exists_r, P: tl.constexpr):
    """[r, P], rows starting at ptr + offset_r; zeros for those that do not exist (None: all do)."""
    ptr_rp = ptr + offset_r[:, None] + tl.arange(0, P)[None, :]
    if exists_r is None:
        x_rp = tl.load(ptr_rp)
    else:
        x_rp = tl.load(ptr_rp, mask=exists_r[:, None], other=0.0)
    return x_rp


@triton.jit
def store_rows(ptr, offset_r, exists_r, x_rp, P: tl.constexpr):
    ptr_rp = ptr + offset_r[:, None] + tl.arange(0, P)[None, :]
    tl.store(ptr_rp, x_rp.to(ptr.dtype.element_ty), mask=exists_r[:, None])


@triton.jit
def query_tile(tile, num_queries, chunk_size, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(chunk, first position, last position, position of each row, its head in the group, whether it exists)."""
    tiles_per_chunk = tl.cdiv(chunk_size, BLOCK_Q // GROUP)
    chunk = tile // tiles_per_chunk
    first = chunk * chunk_size + (tile % tiles_per_chunk) * (BLOCK_Q // GROUP)
    end = tl.minimum(tl.minimum(first + BLOCK_Q // GROUP, (chunk + 1) * chunk_size), num_queries)
    row_r = tl.arange(0, BLOCK_Q)
    position_r = first + row_r // GROUP
    return chunk, first, end - 1, position_r, row_r % GROUP, position_r < end


@triton.jit
def split_span(first, inner, inner_end, end, TILE: tl.constexpr, ALL_MASKED: tl.constexpr):
    """How tiles cover [first, end) when only the part outside [inner, inner_end) needs a mask.

    Returns: where the unmasked tiles start and their number; the number of masked tiles left of them, and in all.
    """
    inner = tl.minimum(inner, end)
    num_left = tl.cdiv(tl.maximum(inner - first, 0), TILE)
    num_inner = tl.maximum(inner_end - inner, 0) // TILE
    if ALL_MASKED:
        num_inner = 0
    num_right = tl.cdiv(tl.maximum(end - inner - num_inner * TILE, 0), TILE)
    return inner, num_inner, num_left, num_left + num_right


@triton.jit
def masked_tile(i, inner, num_inner, num_left, TILE: tl.constexpr):
    """Where the i-th masked tile of split_span starts."""
    skipped = tl.where(i < num_left, 0, num_inner)
    return inner + (i - num_left + skipped) * TILE


@triton.jit
def band_of_queries(first, last, age, window_size, lowest, BLOCK_K: tl.constexpr, ALL_MASKED: tl.constexpr):
    """split_span over the keys of a set that the queries first .. last read."""
    oldest = first - age - window_size + 1
    inner = tl.maximum(last - age - window_size + 1, lowest)
    return split_span(tl.maximum(oldest, lowest), inner, first - age + 1, last - age + 1, BLOCK_K, ALL_MASKED)


@triton.jit
def in_band(query, key, age, window_size):
    distance = query - key - age
    return (distance >= 0) & (distance < window_size)


@triton.jit
def load_doc(docs_ptr, position, exists, ABSENT: tl.constexpr):
    return tl.load(docs_ptr + position, mask=exists, other=ABSENT).to(tl.int32)


@triton.jit
def softmax_step(q_rp, k_np, v_np, allowed_rn, out_rp, max_r, sum_r, scale_log2):
    """Take one tile of keys into the running softmax (online: arXiv:2205.14135, algorithm 1, with 2 as the base)."""
    score_rn = dot(q_rp, tl.trans(k_np))
    if allowed_rn is not None:
        score_rn = tl.where(allowed_rn, score_rn, float("-inf"))
    new_max_r = tl.maximum(max_r, tl.max(score_rn, 1) * scale_log2)
    prob_rn = tl.math.exp2(score_rn * scale_log2 - new_max_r[:, None])
    shrink_r = tl.math.exp2(max_r - new_max_r)
    out_rp = dot(prob_rn.to(v_np.dtype), v_np, out_rp * shrink_r[:, None])
    return out_rp, new_max_r, sum_r * shrink_r + tl.sum(prob_rn, 1)


@triton.jit
def attend_band(
    q_rp, position_r, doc_r, first, last, out_rp, max_r, sum_r,
    k_ptr, v_ptr, docs_ptr, k_stride, v_stride, rows_before, age, num_queries, num_past, window_size, scale_log2,
    P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """softmax_step over window (age 0) or fading memory (age W); rows_before: key rows before the first query's."""
    lowest = -tl.minimum(num_past, rows_before)
    inner, num_inner, num_left, num_masked = band_of_queries(
        first, last, age, window_size, lowest, BLOCK_K, docs_ptr is not None
    )
    key_n = tl.arange(0, BLOCK_K)
    for i in range(num_inner):
        row_n = (inner + i * BLOCK_K + rows_before + key_n).to(tl.int64)
        k_np = load_rows(k_ptr, row_n * k_stride, None, P)
        v_np = load_rows(v_ptr, row_n * v_stride, None, P)
        out_rp, max_r, sum_r = softmax_step(q_rp, k_np, v_np, None, out_rp, max_r, sum_r, scale_log2)
    for i in range(num_masked):
        position_n = masked_tile(i, inner, num_inner, num_left, BLOCK_K) + key_n
        exists_n = (position_n >= lowest) & (position_n < num_queries - age)
        allowed_rn = in_band(position_r[:, None], position_n[None, :], age, window_size) & exists_n[None, :]
        if docs_ptr is not None:
            allowed_rn &= doc_r[:, None] == load_doc(docs_ptr, position_n, exists_n, -2)[None, :]
        row_n = (position_n + rows_before).to(tl.int64)
        k_np = load_rows(k_ptr, row_n * k_stride, exists_n, P)
        v_np = load_rows(v_ptr, row_n * v_stride, exists_n, P)
        out_rp, max_r, sum_r = softmax_step(q_rp, k_np, v_np, allowed_rn, out_rp, max_r, sum_r, scale_log2)
    return out_rp, max_r, sum_r


# Sizes on which no specialised code depends
SIZES = ["num_queries", "num_past", "window_size", "chunk_size", "num_chunks", "rows_before", "fading_rows_before"]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, fading_k_ptr, fading_v_ptr, eidetic_q_ptr, eidetic_k_ptr, eidetic_v_ptr, index_ptr, docs_ptr,
    out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, fading_k_strides, fading_v_strides, eidetic_q_strides, eidetic_k_strides,
    eidetic_v_strides, out_strides, lse_strides,
    num_queries, num_past, window_size, chunk_size, num_chunks, rows_before, fading_rows_before, scale_log2,
    NUM_SLOTS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out and lse, the base-2 logarithm of the softmax's denominator, of one query tile. Grid: tiles, kv heads, b."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the tiles that read most keys first
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunk, first, last, position_r, head_r, exists_r = query_tile(tile, num_queries, chunk_size, GROUP, BLOCK_Q)
    time_r, head_r = position_r.to(tl.int64), kv_head * GROUP + head_r
    doc_r = None
    if docs_ptr is not None:
        docs_ptr += batch * num_queries
        doc_r = load_doc(docs_ptr, position_r, exists_r, -1)

    out_rp = tl.zeros([BLOCK_Q, P], tl.float32)
    max_r = tl.full([BLOCK_Q], UNSEEN, tl.float32)
    sum_r = tl.where(exists_r, 0.0, 1.0)  # rows that do not exist may read nothing, and are divided too
    q_rp = load_rows(q_ptr + batch * q_strides[0], time_r * q_strides[1] + head_r * q_strides[2], exists_r, P)
    out_rp, max_r, sum_r = attend_band(
        q_rp, position_r, doc_r, first, last, out_rp, max_r, sum_r,
        head_of(k_ptr, k_strides, batch, kv_head), head_of(v_ptr, v_strides, batch, kv_head),
        docs_ptr, k_strides[1], v_strides[1], rows_before, 0, num_queries, num_past, window_size, scale_log2,
        P, BLOCK_K,
    )  # fmt: skip
    if fading_k_ptr is not None:
        out_rp, max_r, sum_r = attend_band(
            q_rp, position_r, doc_r, first, last, out_rp, max_r, sum_r,
            head_of(fading_k_ptr, fading_k_strides, batch, kv_head),
            head_of(fading_v_ptr, fading_v_strides, batch, kv_head),
            docs_ptr, fading_k_strides[1], fading_v_strides[1], fading_rows_before, window_size,
            num_queries, num_past, window_size, scale_log2, P, BLOCK_K,
        )  # fmt: skip
    if eidetic_k_ptr is not None:
        offset_r = time_r * eidetic_q_strides[1] + head_r * eidetic_q_strides[2]
        q_rp = load_rows(eidetic_q_ptr + batch * eidetic_q_strides[0], offset_r, exists_r, P)
        eidetic_k_ptr = head_of(eidetic_k_ptr, eidetic_k_strides, batch, kv_head)
        eidetic_v_ptr = head_of(eidetic_v_ptr, eidetic_v_strides, batch, kv_head)
        index_ptr += (batch * num_chunks + chunk) * NUM_SLOTS
        for slot in range(0, NUM_SLOTS, BLOCK_K):
            row_n, full_n = load_slots(index_ptr, slot, NUM_SLOTS, BLOCK_K)
            allowed_rn = full_n[None, :]
            if docs_ptr is not None:
                allowed_rn = allowed_rn & (doc_r == tl.load(docs_ptr + chunk * chunk_size).to(tl.int32))[:, None]
            k_np = load_rows(eidetic_k_ptr, row_n * eidetic_k_strides[1], full_n, P)
            v_np = load_rows(eidetic_v_ptr, row_n * eidetic_v_strides[1], full_n, P)
            out_rp, max_r, sum_r = softmax_step(q_rp, k_np, v_np, allowed_rn, out_rp, max_r, sum_r, scale_log2)

    offset_r = time_r * out_strides[1] + head_r * out_strides[2]
    store_rows(out_ptr + batch * out_strides[0], offset_r, exists_r, out_rp / sum_r[:, None], P)
    lse_ptr += batch * lse_strides[0] + time_r * lse_strides[1] + head_r
    tl.store(lse_ptr, max_r + tl.math.log2(sum_r), mask=exists_r)


@triton.jit
def load_slots(index_ptr, slot, NUM_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """(row of each slot, whether it holds one)."""
    slot_n = slot + tl.arange(0, BLOCK)
    row_n = tl.load(index_ptr + slot_n, mask=slot_n < NUM_SLOTS, other=-1).to(tl.int64)
    return row_n, row_n >= 0

"""Device code of memory attention's backward pass: README.md has the formulas.

Probabilities are computed again from the scores and the saved logarithm of the denominator. No kernel adds to memory
that another program writes, so gradients are the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.triton_math import dot
from kernels.memory_attention.triton_forward import (
    SIZES,
    band_of_queries,
    head_of,
    in_band,
    load_doc,
    load_rows,
    load_slots,
    masked_tile,
    query_tile,
    split_span,
    store_rows,
)


@triton.jit
def query_step(q_rp, grad_out_rp, lse_r, delta_r, k_np, v_np, allowed_rn, grad_q_rp, scale_log2):
    """grad_q + dS K of one tile of keys; the caller multiplies by the scale of the scores."""
    score_rn = dot(q_rp, tl.trans(k_np))
    if allowed_rn is not None:
        score_rn = tl.where(allowed_rn, score_rn, float("-inf"))
    prob_rn = tl.math.exp2(score_rn * scale_log2 - lse_r[:, None])
    grad_score_rn = prob_rn * (dot(grad_out_rp, tl.trans(v_np)) - delta_r[:, None])
    return dot(grad_score_rn.to(k_np.dtype), k_np, grad_q_rp)


@triton.jit
def query_grad_band(
    q_rp, grad_out_rp, lse_r, delta_r, position_r, doc_r, first, last, grad_q_rp,
    k_ptr, v_ptr, docs_ptr, k_stride, v_stride, rows_before, age, num_queries, num_past, window_size, scale_log2,
    P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """query_step over window (age 0) or fading memory (age W)."""
    lowest = -tl.minimum(num_past, rows_before)
    inner, num_inner, num_left, num_masked = band_of_queries(
        first, last, age, window_size, lowest, BLOCK_K, docs_ptr is not None
    )
    key_n = tl.arange(0, BLOCK_K)
    for i in range(num_inner):
        row_n = (inner + i * BLOCK_K + rows_before + key_n).to(tl.int64)
        k_np = load_rows(k_ptr, row_n * k_stride, None, P)
        v_np = load_rows(v_ptr, row_n * v_stride, None, P)
        grad_q_rp = query_step(q_rp, grad_out_rp, lse_r, delta_r, k_np, v_np, None, grad_q_rp, scale_log2)
    for i in range(num_masked):
        position_n = masked_tile(i, inner, num_inner, num_left, BLOCK_K) + key_n
        exists_n = (position_n >= lowest) & (position_n < num_queries - age)
        allowed_rn = in_band(position_r[:, None], position_n[None, :], age, window_size) & exists_n[None, :]
        if docs_ptr is not None:
            allowed_rn &= doc_r[:, None] == load_doc(docs_ptr, position_n, exists_n, -2)[None, :]
        row_n = (position_n + rows_before).to(tl.int64)
        k_np = load_rows(k_ptr, row_n * k_stride, exists_n, P)
        v_np = load_rows(v_ptr, row_n * v_stride, exists_n, P)
        grad_q_rp = query_step(q_rp, grad_out_rp, lse_r, delta_r, k_np, v_np, allowed_rn, grad_q_rp, scale_log2)
    return grad_q_rp


@triton.jit(do_not_specialize=SIZES)
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, fading_k_ptr, fading_v_ptr, eidetic_q_ptr, eidetic_k_ptr, eidetic_v_ptr, index_ptr, docs_ptr,
    out_ptr, lse_ptr, grad_out_ptr, delta_ptr, grad_q_ptr, grad_eidetic_q_ptr,
    q_strides, k_strides, v_strides, fading_k_strides, fading_v_strides, eidetic_q_strides, eidetic_k_strides,
    eidetic_v_strides, out_strides, lse_strides, grad_out_strides,
    num_queries, num_past, window_size, chunk_size, num_chunks, rows_before, fading_rows_before, scale, scale_log2,
    NUM_SLOTS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of both kinds of queries, and delta = sum(grad_out * out), of one query tile. Grid as in the forward.

    The gradients are laid out as out is, delta as lse.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunk, first, last, position_r, head_r, exists_r = query_tile(tile, num_queries, chunk_size, GROUP, BLOCK_Q)
    time_r, head_r = position_r.to(tl.int64), kv_head * GROUP + head_r
    doc_r = None
    if docs_ptr is not None:
        docs_ptr += batch * num_queries
        doc_r = load_doc(docs_ptr, position_r, exists_r, -1)

    out_offset_r = batch * out_strides[0] + time_r * out_strides[1] + head_r * out_strides[2]
    lse_offset_r = batch * lse_strides[0] + time_r * lse_strides[1] + head_r
    grad_out_offset_r = batch * grad_out_strides[0] + time_r * grad_out_strides[1] + head_r * grad_out_strides[2]
    grad_out_rp = load_rows(grad_out_ptr, grad_out_offset_r, exists_r, P)
    out_rp = load_rows(out_ptr, out_offset_r, exists_r, P)
    delta_r = tl.sum(grad_out_rp.to(tl.float32) * out_rp.to(tl.float32), 1)
    tl.store(delta_ptr + lse_offset_r, delta_r, mask=exists_r)
    lse_r = tl.load(lse_ptr + lse_offset_r, mask=exists_r, other=0.0)

    q_rp = load_rows(q_ptr + batch * q_strides[0], time_r * q_strides[1] + head_r * q_strides[2], exists_r, P)
    grad_q_rp = query_grad_band(
        q_rp, grad_out_rp, lse_r, delta_r, position_r, doc_r, first, last, tl.zeros([BLOCK_Q, P], tl.float32),
        head_of(k_ptr, k_strides, batch, kv_head), head_of(v_ptr, v_strides, batch, kv_head),
        docs_ptr, k_strides[1], v_strides[1], rows_before, 0, num_queries, num_past, window_size, scale_log2,
        P, BLOCK_K,
    )  # fmt: skip
    if fading_k_ptr is not None:
        grad_q_rp = query_grad_band(
            q_rp, grad_out_rp, lse_r, delta_r, position_r, doc_r, first, last, grad_q_rp,
            head_of(fading_k_ptr, fading_k_strides, batch, kv_head),
            head_of(fading_v_ptr, fading_v_strides, batch, kv_head),
            docs_ptr, fading_k_strides[1], fading_v_strides[1], fading_rows_before, window_size,
            num_queries, num_past, window_size, scale_log2, P, BLOCK_K,
        )  # fmt: skip
    store_rows(grad_q_ptr, out_offset_r, exists_r, grad_q_rp * scale, P)

    if eidetic_k_ptr is not None:
        offset_r = time_r * eidetic_q_strides[1] + head_r * eidetic_q_strides[2]
        q_rp = load_rows(eidetic_q_ptr + batch * eidetic_q_strides[0], offset_r, exists_r, P)
        grad_q_rp = tl.zeros([BLOCK_Q, P], tl.float32)
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
            grad_q_rp = query_step(q_rp, grad_out_rp, lse_r, delta_r, k_np, v_np, allowed_rn, grad_q_rp, scale_log2)
        store_rows(grad_eidetic_q_ptr, out_offset_r, exists_r, grad_q_rp * scale, P)


@triton.jit
def key_step(
    k_np, v_np, grad_k_np, grad_v_np, row_r, exists_r, allowed_nr,
    q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_strides, grad_out_strides, lse_stride, scale_log2,
    GROUP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add what a tile of query rows gives to the gradients of a tile of keys and values.

    row_r: position x GROUP + head.  A row that does not exist reads zeros, which add nothing.
    """
    time_r, head_r = (row_r // GROUP).to(tl.int64), row_r % GROUP
    q_rp = load_rows(q_ptr, time_r * q_strides[1] + head_r * q_strides[2], exists_r, P)
    grad_out_rp = load_rows(grad_out_ptr, time_r * grad_out_strides[1] + head_r * grad_out_strides[2], exists_r, P)
    lse_offset_r = time_r * lse_stride + head_r
    if exists_r is None:
        lse_r, delta_r = tl.load(lse_ptr + lse_offset_r), tl.load(delta_ptr + lse_offset_r)
    else:
        lse_r = tl.load(lse_ptr + lse_offset_r, mask=exists_r, other=0.0)
        delta_r = tl.load(delta_ptr + lse_offset_r, mask=exists_r, other=0.0)
    score_nr = dot(k_np, tl.trans(q_rp))
    if allowed_nr is not None:
        score_nr = tl.where(allowed_nr, score_nr, float("-inf"))
    prob_nr = tl.math.exp2(score_nr * scale_log2 - lse_r[None, :])
    grad_v_np = dot(prob_nr.to(v_np.dtype), grad_out_rp, grad_v_np)
    grad_score_nr = prob_nr * (dot(v_np, tl.trans(grad_out_rp)) - delta_r[None, :])
    return dot(grad_score_nr.to(k_np.dtype), q_rp, grad_k_np), grad_v_np


@triton.jit(do_not_specialize=SIZES)
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, docs_ptr, lse_ptr, delta_ptr, grad_out_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, k_strides, v_strides, lse_strides, grad_out_strides, grad_k_strides,
    num_queries, num_past, window_size, age, rows_before, scale, scale_log2,
    GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of the window (age 0) or the fading memory (age W).

    Grid: key tiles, kv heads, b. Loops over the rows (position x GROUP + head) of the queries that read some of them.
    """
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_K - rows_before
    last = tl.minimum(first + BLOCK_K, num_queries - age) - 1
    position_n = first + tl.arange(0, BLOCK_K)
    exists_n = position_n < num_queries - age
    row_n = (position_n + rows_before).to(tl.int64)
    k_np = load_rows(head_of(k_ptr, k_strides, batch, kv_head), row_n * k_strides[1], exists_n, P)
    v_np = load_rows(head_of(v_ptr, v_strides, batch, kv_head), row_n * v_strides[1], exists_n, P)
    if docs_ptr is not None:
        docs_ptr += batch * num_queries
        doc_n = load_doc(docs_ptr, position_n, exists_n, -2)
    q_ptr = head_of(q_ptr, q_strides, batch, kv_head * GROUP)
    grad_out_ptr = head_of(grad_out_ptr, grad_out_strides, batch, kv_head * GROUP)
    lse_ptr += batch * lse_strides[0] + kv_head * GROUP
    delta_ptr += batch * lse_strides[0] + kv_head * GROUP

    grad_k_np = tl.zeros([BLOCK_K, P], tl.float32)
    grad_v_np = tl.zeros([BLOCK_K, P], tl.float32)
    inner, num_inner, num_left, num_masked = split_span(
        tl.maximum(first + age, 0) * GROUP,
        tl.maximum(last + age, 0) * GROUP,
        tl.minimum(first + age + window_size, num_queries) * GROUP,
        tl.minimum(last + age + window_size, num_queries) * GROUP,
        BLOCK_Q,
        docs_ptr is not None,
    )
    for i in range(num_inner):
        row_r = inner + i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        grad_k_np, grad_v_np = key_step(
            k_np, v_np, grad_k_np, grad_v_np, row_r, None, None,
            q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_strides, grad_out_strides, lse_strides[1], scale_log2, GROUP, P,
        )  # fmt: skip
    for i in range(num_masked):
        row_r = masked_tile(i, inner, num_inner, num_left, BLOCK_Q) + tl.arange(0, BLOCK_Q)
        exists_r = (row_r >= 0) & (row_r < num_queries * GROUP)
        allowed_nr = in_band((row_r // GROUP)[None, :], position_n[:, None], age, window_size)
        if docs_ptr is not None:
            allowed_nr &= load_doc(docs_ptr, row_r // GROUP, exists_r, -1)[None, :] == doc_n[:, None]
        grad_k_np, grad_v_np = key_step(
            k_np, v_np, grad_k_np, grad_v_np, row_r, exists_r, allowed_nr,
            q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_strides, grad_out_strides, lse_strides[1], scale_log2, GROUP, P,
        )  # fmt: skip
    read_n1 = (position_n >= -num_past)[:, None]  # a key mixes with no other, so one that is not read is undone here
    offset_n = batch * grad_k_strides[0] + row_n * grad_k_strides[1] + kv_head * grad_k_strides[2]
    store_rows(grad_k_ptr, offset_n, exists_n, tl.where(read_n1, grad_k_np * scale, 0.0), P)
    store_rows(grad_v_ptr, offset_n, exists_n, tl.where(read_n1, grad_v_np, 0.0), P)


@triton.jit(do_not_specialize=SIZES)
def slot_grad_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, docs_ptr, lse_ptr, delta_ptr, grad_out_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, k_strides, v_strides, lse_strides, grad_out_strides, grad_k_strides,
    num_queries, chunk_size, num_chunks, scale, scale_log2,
    NUM_SLOTS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one chunk's queries give to the keys and values in its slots, [b, chunks x NUM_SLOTS, kv heads, P].

    Grid: chunks x tiles of slots, kv heads, b. Entries of empty slots mean nothing: sum_slots_kernel reads none.
    """
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles: tl.constexpr = (NUM_SLOTS + BLOCK_K - 1) // BLOCK_K
    chunk, slot = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_K
    index_ptr += (batch * num_chunks + chunk) * NUM_SLOTS
    row_n, full_n = load_slots(index_ptr, slot, NUM_SLOTS, BLOCK_K)
    k_np = load_rows(head_of(k_ptr, k_strides, batch, kv_head), row_n * k_strides[1], full_n, P)
    v_np = load_rows(head_of(v_ptr, v_strides, batch, kv_head), row_n * v_strides[1], full_n, P)
    q_ptr = head_of(q_ptr, q_strides, batch, kv_head * GROUP)
    grad_out_ptr = head_of(grad_out_ptr, grad_out_strides, batch, kv_head * GROUP)
    lse_ptr += batch * lse_strides[0] + kv_head * GROUP
    delta_ptr += batch * lse_strides[0] + kv_head * GROUP

    grad_k_np = tl.zeros([BLOCK_K, P], tl.float32)
    grad_v_np = tl.zeros([BLOCK_K, P], tl.float32)
    end = tl.minimum((chunk + 1) * chunk_size, num_queries) * GROUP
    for start in range(chunk * chunk_size * GROUP, end, BLOCK_Q):
        row_r = start + tl.arange(0, BLOCK_Q)
        exists_r = row_r < end
        allowed_nr = None
        if docs_ptr is not None:
            doc_ptr = docs_ptr + batch * num_queries
            of_chunk = tl.load(doc_ptr + chunk * chunk_size).to(tl.int32)
            allowed_nr = (load_doc(doc_ptr, row_r // GROUP, exists_r, -1) == of_chunk)[None, :]
        grad_k_np, grad_v_np = key_step(
            k_np, v_np, grad_k_np, grad_v_np, row_r, exists_r, allowed_nr,
            q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_strides, grad_out_strides, lse_strides[1], scale_log2, GROUP, P,
        )  # fmt: skip
    slot_n = slot + tl.arange(0, BLOCK_K)
    entry_n = chunk.to(tl.int64) * NUM_SLOTS + slot_n
    offset_n = batch * grad_k_strides[0] + entry_n * grad_k_strides[1] + kv_head * grad_k_strides[2]
    store_rows(grad_k_ptr, offset_n, slot_n < NUM_SLOTS, grad_k_np * scale, P)
    store_rows(grad_v_ptr, offset_n, slot_n < NUM_SLOTS, grad_v_np, P)


@triton.jit(do_not_specialize=["num_rows", "num_entries", "width"])
def sum_slots_kernel(
    slot_grad_k_ptr, slot_grad_v_ptr, order_ptr, begin_ptr, grad_k_ptr, grad_v_ptr,
    num_rows, num_entries, width, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Gradients of one row: the sum, in order, over the entries of all chunks that hold it. Grid: rows, columns, b.

    order: entries sorted by row.  begin: where each row's entries begin in it, [b, rows + 1].
    """
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin_ptr += batch * (num_rows + 1) + row
    begin, end = tl.load(begin_ptr).to(tl.int32), tl.load(begin_ptr + 1).to(tl.int32)
    sum_k_c = tl.zeros([BLOCK], tl.float32)
    sum_v_c = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, ENTRIES):
        place_e = start + tl.arange(0, ENTRIES)
        entry_e = batch * num_entries + tl.load(order_ptr + batch * num_entries + place_e, mask=place_e < end, other=0)
        mask_ec = (place_e < end)[:, None] & (column_c < width)[None, :]
        offset_ec = entry_e[:, None] * width + column_c[None, :]
        sum_k_c += tl.sum(tl.load(slot_grad_k_ptr + offset_ec, mask=mask_ec, other=0.0), 0)
        sum_v_c += tl.sum(tl.load(slot_grad_v_ptr + offset_ec, mask=mask_ec, other=0.0), 0)
    offset_c = (batch * num_rows + row) * width + column_c
    tl.store(grad_k_ptr + offset_c, sum_k_c.to(grad_k_ptr.dtype.element_ty), mask=column_c < width)
    tl.store(grad_v_ptr + offset_c, sum_v_c.to(grad_v_ptr.dtype.element_ty), mask=column_c < width)

"""Device code of memory attention's backward pass: README.md has the formulas.

Probabilities are computed again from the scores and the saved logarithm of the denominator. No kernel adds to memory
that another program writes, so gradients are the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.triton_math import dot
from kernels.memory_attention.triton_forward import (
    SCANNED,
    SIZES,
    extremes,
    hide,
    in_window,
    load_doc,
    load_rows,
    load_slots,
    load_tile,
    places_read,
    query_tile,
    row_of,
    rows_of_queries,
    store_rows,
    store_tile,
)

UNIT = tl.constexpr(4)  # positions at multiples of which a tile of lse or delta may begin: 16 bytes


@triton.jit
def query_step(score_rn, grad_out_rp, lse_r, delta_r, k_np, v_np, grad_q_rp, scale_log2):
    """grad_q + dS K of one tile of keys; the caller multiplies by the scale of the scores."""
    prob_rn = tl.math.exp2(score_rn * scale_log2 - lse_r[:, None])
    grad_score_rn = prob_rn * (dot(grad_out_rp, tl.trans(v_np)) - delta_r[:, None])
    return dot(grad_score_rn.to(k_np.dtype), k_np, grad_q_rp)


@triton.jit
def query_grad_set(
    q_rp, grad_out_rp, lse_r, delta_r, k_tiles, v_tiles, batch, kv_head, start, end, inner, inner_end, rows_before,
    position_r, doc_r, docs_ptr, age, window_size, grad_q_rp, scale_log2, BLOCK_K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """query_step over the places [start, end) of the window (age 0) or the fading memory (age W)."""
    for place in range(start, end, BLOCK_K):
        place_n = place + tl.arange(0, BLOCK_K)
        k_np = load_tile(k_tiles, batch, place + rows_before, kv_head, BLOCK_K, P)
        v_np = load_tile(v_tiles, batch, place + rows_before, kv_head, BLOCK_K, P)
        score_rn = dot(q_rp, tl.trans(k_np))
        score_rn = hide(score_rn, place, place_n, inner, inner_end, end, position_r, doc_r, docs_ptr, age, window_size)
        grad_q_rp = query_step(score_rn, grad_out_rp, lse_r, delta_r, k_np, v_np, grad_q_rp, scale_log2)
    return grad_q_rp


@triton.jit(do_not_specialize=SIZES)
def query_grad_kernel(
    q_ptr, k_tiles, v_tiles, fading_k_tiles, fading_v_tiles, eidetic_q_ptr, eidetic_k_ptr, eidetic_v_ptr, index_ptr,
    docs_ptr, out_ptr, lse_ptr, grad_out_ptr, delta_ptr, grad_q_ptr, grad_eidetic_q_ptr,
    q_strides, eidetic_q_strides, eidetic_k_strides, eidetic_v_strides, out_strides, lse_strides, grad_out_strides,
    num_queries, window_size, chunk_size, num_chunks, lowest, fading_lowest, rows_before, fading_rows_before,
    scale, scale_log2,
    NUM_SLOTS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of both kinds of queries, and delta = sum(grad_out * out), of one query tile. As in the forward.

    The gradients are laid out as out is, delta as lse.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    chunk, first, last, position_r, exists_r = query_tile(tile, num_queries, chunk_size, GROUP, BLOCK_Q)
    doc_r = None
    if docs_ptr is not None:
        docs_ptr += batch.to(tl.int64) * num_queries
        doc_r = load_doc(docs_ptr, position_r, exists_r, -1)
    start, fading_start, end, inner, fading_inner, inner_end = places_read(
        docs_ptr, doc_r, exists_r, first, last, window_size, lowest, fading_lowest
    )

    grad_out_rp = load_rows(
        rows_of_queries(grad_out_ptr, grad_out_strides, batch, first, kv_head, GROUP, BLOCK_Q), exists_r, P
    )
    out_ptr_r = rows_of_queries(out_ptr, out_strides, batch, first, kv_head, GROUP, BLOCK_Q)
    out_rp = load_rows(out_ptr_r, exists_r, P)
    delta_r = tl.sum(grad_out_rp.to(tl.float32) * out_rp.to(tl.float32), 1)
    delta_ptr_r = rows_of_queries(delta_ptr, lse_strides, batch, first, kv_head, GROUP, BLOCK_Q)
    tl.store(delta_ptr_r, delta_r, mask=exists_r)
    lse_ptr_r = rows_of_queries(lse_ptr, lse_strides, batch, first, kv_head, GROUP, BLOCK_Q)
    lse_r = tl.load(lse_ptr_r, mask=exists_r, other=0.0)

    grad_q_rp = tl.zeros([BLOCK_Q, P], tl.float32)
    q_ptr_r = rows_of_queries(q_ptr, q_strides, batch, first, kv_head, GROUP, BLOCK_Q)
    q_rp = load_rows(q_ptr_r, exists_r, P)
    grad_q_rp = query_grad_set(
        q_rp, grad_out_rp, lse_r, delta_r, k_tiles, v_tiles, batch, kv_head, start, end, inner, inner_end, rows_before,
        position_r, doc_r, docs_ptr, 0, window_size, grad_q_rp, scale_log2, BLOCK_K, P,
    )  # fmt: skip
    if fading_k_tiles is not None:
        grad_q_rp = query_grad_set(
            q_rp, grad_out_rp, lse_r, delta_r, fading_k_tiles, fading_v_tiles, batch, kv_head, fading_start, end,
            fading_inner, inner_end, fading_rows_before, position_r, doc_r, docs_ptr, window_size, window_size,
            grad_q_rp, scale_log2, BLOCK_K, P,
        )  # fmt: skip
    store_rows(
        rows_of_queries(grad_q_ptr, out_strides, batch, first, kv_head, GROUP, BLOCK_Q), exists_r, grad_q_rp * scale, P
    )

    if eidetic_k_ptr is not None:
        q_rp = load_rows(
            rows_of_queries(eidetic_q_ptr, eidetic_q_strides, batch, first, kv_head, GROUP, BLOCK_Q), exists_r, P
        )
        grad_q_rp = tl.zeros([BLOCK_Q, P], tl.float32)
        index_ptr += (batch.to(tl.int64) * num_chunks + chunk) * NUM_SLOTS
        for slot in range(0, NUM_SLOTS, BLOCK_M):
            row_m, full_m = load_slots(index_ptr, slot, NUM_SLOTS, BLOCK_M)
            allowed_rm = full_m[None, :]
            if docs_ptr is not None:
                allowed_rm = allowed_rm & (doc_r == tl.load(docs_ptr + chunk * chunk_size).to(tl.int32))[:, None]
            k_mp = load_rows(row_of(eidetic_k_ptr, eidetic_k_strides, batch, row_m, kv_head), full_m, P)
            v_mp = load_rows(row_of(eidetic_v_ptr, eidetic_v_strides, batch, row_m, kv_head), full_m, P)
            score_rm = tl.where(allowed_rm, dot(q_rp, tl.trans(k_mp)), float("-inf"))
            grad_q_rp = query_step(score_rm, grad_out_rp, lse_r, delta_r, k_mp, v_mp, grad_q_rp, scale_log2)
        store_rows(
            rows_of_queries(grad_eidetic_q_ptr, out_strides, batch, first, kv_head, GROUP, BLOCK_Q),
            exists_r,
            grad_q_rp * scale,
            P,
        )


@triton.jit
def load_per_query(tiles, batch, head, time, ROWS: tl.constexpr):
    """[ROWS] of one head's lse or delta, zeros after the last query; `tiles` as in load_tile."""
    if isinstance(tiles, tl.core.tensor_descriptor_base):
        x_r = tiles.load([batch, head, time]).reshape([ROWS])
    else:
        ptr, strides, num_queries = tiles
        time_r = time + tl.arange(0, ROWS)
        ptr += batch.to(tl.int64) * strides[0] + head * strides[1]
        x_r = tl.load(ptr + time_r, mask=time_r < num_queries, other=0.0)
    return x_r


@triton.jit
def load_queries(
    q_tiles, grad_out_tiles, lse_tiles, delta_tiles, batch, time, head, BLOCK_Q: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """q, grad_out, lse and delta of a tile of one head's queries; zeros after the last one, which add nothing."""
    q_rp = load_tile(q_tiles, batch, time, head, BLOCK_Q, P)
    grad_out_rp = load_tile(grad_out_tiles, batch, time, head, BLOCK_Q, P)
    lse_r = load_per_query(lse_tiles, batch, head, time, BLOCK_Q)
    return q_rp, grad_out_rp, lse_r, load_per_query(delta_tiles, batch, head, time, BLOCK_Q)


@triton.jit
def next_queries(time, head, start, end, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(first position, head) of the tile of queries after this one: those of the next head follow those of one."""
    time += BLOCK_Q
    if GROUP > 1:
        at_end = time >= end
        time, head = tl.where(at_end, start, time), tl.where(at_end, head + 1, head)
    return time, head


@triton.jit
def key_step(score_nr, q_rp, grad_out_rp, lse_r, delta_r, k_np, v_np, grad_k_np, grad_v_np, scale_log2):
    """Add what a tile of queries gives to the gradients of a tile of keys and values."""
    prob_nr = tl.math.exp2(score_nr * scale_log2 - lse_r[None, :])
    grad_v_np = dot(prob_nr.to(v_np.dtype), grad_out_rp, grad_v_np)
    grad_score_nr = prob_nr * (dot(v_np, tl.trans(grad_out_rp)) - delta_r[None, :])
    return dot(grad_score_nr.to(k_np.dtype), q_rp, grad_k_np), grad_v_np


@triton.jit
def documents_after(docs_ptr, doc_n, exists_n, begin, end):
    """(end of the positions in [begin, end) whose document a key may be in, end of those in the one of all keys).

    The second is `begin` if the keys are in several documents.
    """
    low, high = extremes(doc_n, exists_n)
    read, same = begin, tl.where(low == high, end, begin)
    for first in range(begin, end, SCANNED):
        position = first + tl.arange(0, SCANNED)
        exists = position < end
        doc = load_doc(docs_ptr, position, exists, -1)
        read = tl.maximum(read, tl.max(tl.where(exists & (doc >= low) & (doc <= high), position + 1, begin)))
        same = tl.minimum(same, tl.min(tl.where(exists & (doc != high), position, end)))
    return read, same


@triton.jit(do_not_specialize=SIZES)
def key_grad_kernel(
    q_tiles, grad_out_tiles, lse_tiles, delta_tiles, grad_k_tiles, grad_v_tiles, docs_ptr, k_ptr, v_ptr,
    k_strides, v_strides,
    num_queries, lowest, window_size, age, rows_before, scale, scale_log2,
    GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of the window (age 0) or the fading memory (age W).

    Grid: key tiles, kv heads, b. Loops over the queries that read some of them, of one head of the group after another.
    """
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_K
    first = row - rows_before
    last = tl.minimum(first + BLOCK_K, num_queries) - 1
    place_n = first + tl.arange(0, BLOCK_K)
    exists_n = place_n < num_queries
    row_n = (row + tl.arange(0, BLOCK_K)).to(tl.int64)
    k_np = load_rows(row_of(k_ptr, k_strides, batch, row_n, kv_head), exists_n, P)
    v_np = load_rows(row_of(v_ptr, v_strides, batch, row_n, kv_head), exists_n, P)

    start, end = tl.maximum(first, 0) // UNIT * UNIT, tl.minimum(last + window_size, num_queries)
    inner_end = first + window_size  # read by all from `last` on
    if docs_ptr is not None:
        docs_ptr += batch.to(tl.int64) * num_queries
        doc_n = load_doc(docs_ptr, place_n - age, exists_n, -2)
        end, same = documents_after(docs_ptr, doc_n, exists_n, start, end)
        inner_end = tl.minimum(inner_end, same)
    grad_k_np = tl.zeros([BLOCK_K, P], tl.float32)
    grad_v_np = tl.zeros([BLOCK_K, P], tl.float32)
    time, head = start, kv_head * GROUP
    for _ in range(GROUP * tl.cdiv(end - start, BLOCK_Q)):
        q_rp, grad_out_rp, lse_r, delta_r = load_queries(
            q_tiles, grad_out_tiles, lse_tiles, delta_tiles, batch, time, head, BLOCK_Q, P
        )  # fmt: skip
        score_nr = dot(k_np, tl.trans(q_rp))
        if (time < last) | (time + BLOCK_Q > inner_end):
            time_r = time + tl.arange(0, BLOCK_Q)
            allowed_nr = in_window(time_r[None, :], place_n[:, None], window_size)
            if docs_ptr is not None:
                allowed_nr &= load_doc(docs_ptr, time_r, time_r < end, -1)[None, :] == doc_n[:, None]
            score_nr = tl.where(allowed_nr, score_nr, float("-inf"))
        grad_k_np, grad_v_np = key_step(
            score_nr, q_rp, grad_out_rp, lse_r, delta_r, k_np, v_np, grad_k_np, grad_v_np, scale_log2
        )
        time, head = next_queries(time, head, start, end, GROUP, BLOCK_Q)
    read_n1 = (place_n >= lowest)[:, None]  # a key mixes with no other, so one that is not read is undone here
    grad_k_np, grad_v_np = tl.where(read_n1, grad_k_np * scale, 0.0), tl.where(read_n1, grad_v_np, 0.0)
    store_tile(grad_k_tiles, batch, row, kv_head, grad_k_np, BLOCK_K, P)
    store_tile(grad_v_tiles, batch, row, kv_head, grad_v_np, BLOCK_K, P)


@triton.jit(do_not_specialize=SIZES)
def slot_grad_kernel(
    q_tiles, grad_out_tiles, lse_tiles, delta_tiles, index_ptr, docs_ptr, k_ptr, v_ptr, grad_k_ptr, grad_v_ptr,
    k_strides, v_strides, grad_k_strides,
    num_queries, chunk_size, num_chunks, scale, scale_log2,
    NUM_SLOTS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one chunk's queries give to the keys and values in its slots, [b, chunks x NUM_SLOTS, kv heads, P].

    Grid: chunks x tiles of slots, kv heads, b. Entries of empty slots mean nothing: sum_slots_kernel reads none.
    """
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    tiles: tl.constexpr = (NUM_SLOTS + BLOCK_K - 1) // BLOCK_K
    chunk, slot = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_K
    index_ptr += (batch.to(tl.int64) * num_chunks + chunk) * NUM_SLOTS
    row_n, full_n = load_slots(index_ptr, slot, NUM_SLOTS, BLOCK_K)
    k_np = load_rows(row_of(k_ptr, k_strides, batch, row_n, kv_head), full_n, P)
    v_np = load_rows(row_of(v_ptr, v_strides, batch, row_n, kv_head), full_n, P)

    first, end = chunk * chunk_size, tl.minimum((chunk + 1) * chunk_size, num_queries)
    start = first // UNIT * UNIT
    if docs_ptr is not None:
        docs_ptr += batch.to(tl.int64) * num_queries
        of_chunk = tl.load(docs_ptr + first).to(tl.int32)
    grad_k_np = tl.zeros([BLOCK_K, P], tl.float32)
    grad_v_np = tl.zeros([BLOCK_K, P], tl.float32)
    time, head = start, kv_head * GROUP
    for _ in range(GROUP * tl.cdiv(end - start, BLOCK_Q)):
        q_rp, grad_out_rp, lse_r, delta_r = load_queries(
            q_tiles, grad_out_tiles, lse_tiles, delta_tiles, batch, time, head, BLOCK_Q, P
        )  # fmt: skip
        time_r = time + tl.arange(0, BLOCK_Q)
        allowed_r = (time_r >= first) & (time_r < end)
        if docs_ptr is not None:
            allowed_r &= load_doc(docs_ptr, time_r, allowed_r, -1) == of_chunk
        score_nr = tl.where(allowed_r[None, :], dot(k_np, tl.trans(q_rp)), float("-inf"))
        grad_k_np, grad_v_np = key_step(
            score_nr, q_rp, grad_out_rp, lse_r, delta_r, k_np, v_np, grad_k_np, grad_v_np, scale_log2
        )
        time, head = next_queries(time, head, start, end, GROUP, BLOCK_Q)
    slot_n = slot + tl.arange(0, BLOCK_K)
    entry_n = chunk.to(tl.int64) * NUM_SLOTS + slot_n
    exists_n = slot_n < NUM_SLOTS
    store_rows(row_of(grad_k_ptr, grad_k_strides, batch, entry_n, kv_head), exists_n, grad_k_np * scale, P)
    store_rows(row_of(grad_v_ptr, grad_k_strides, batch, entry_n, kv_head), exists_n, grad_v_np, P)


@triton.jit(do_not_specialize=["num_rows", "num_entries", "width"])
def sum_slots_kernel(
    slot_grad_k_ptr, slot_grad_v_ptr, order_ptr, row_ptr, grad_k_ptr, grad_v_ptr, num_rows, num_entries, width,
    ADDS_V: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Gradients of one row: the sum, in order, over the entries of all chunks that hold it. Grid: entries, columns, b.

    order: entries sorted by row.  row: their rows, num_rows for empty slots.  The program of a row's first entry sums
    them all; rows without one are left as they are.  ADDS_V: grad_v already holds what the window gives to the row.
    """
    first, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row_ptr += batch * num_entries
    row = tl.load(row_ptr + first).to(tl.int32)
    before = tl.load(row_ptr + first - 1, mask=first > 0, other=-1).to(tl.int32)
    if (row != before) & (row < num_rows):
        column_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        exists_c = column_c < width
        offset_c = (batch * num_rows + row) * width + column_c
        sum_k_c = tl.zeros([BLOCK], tl.float32)
        sum_v_c = tl.zeros([BLOCK], tl.float32)
        if ADDS_V:
            sum_v_c = tl.load(grad_v_ptr + offset_c, mask=exists_c, other=0.0).to(tl.float32)
        start, num_held = first, ENTRIES
        while num_held == ENTRIES:
            place_e = start + tl.arange(0, ENTRIES)
            held_e = tl.load(row_ptr + place_e, mask=place_e < num_entries, other=-1).to(tl.int32) == row
            entry_e = batch * num_entries + tl.load(order_ptr + batch * num_entries + place_e, mask=held_e, other=0)
            offset_ec = entry_e[:, None] * width + column_c[None, :]
            mask_ec = held_e[:, None] & exists_c[None, :]
            sum_k_c += tl.sum(tl.load(slot_grad_k_ptr + offset_ec, mask=mask_ec, other=0.0).to(tl.float32), 0)
            sum_v_c += tl.sum(tl.load(slot_grad_v_ptr + offset_ec, mask=mask_ec, other=0.0).to(tl.float32), 0)
            start += ENTRIES
            num_held = tl.sum(held_e.to(tl.int32), 0)
        tl.store(grad_k_ptr + offset_c, sum_k_c.to(grad_k_ptr.dtype.element_ty), mask=exists_c)
        tl.store(grad_v_ptr + offset_c, sum_v_c.to(grad_v_ptr.dtype.element_ty), mask=exists_c)

"""Device code of memory attention: how tiles cover the three sets, and the forward pass.

A query tile holds BLOCK_Q rows: BLOCK_Q // GROUP positions of one chunk, times the GROUP query heads that share a
key/value head, so that a key read once serves them all. Positions count from the first query's.

The same queries, i <= t < i + W, read the window's key of position i and the fading memory's of i - W. So a place i
below stands for either key, and both sets are read alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.triton_math import dot

UNSEEN = tl.constexpr(-1e30)  # a maximum over no scores; finite, because -inf - -inf is not 0
SCANNED = tl.constexpr(1024)  # document ids that are looked at together


@triton.jit
def row_of(ptr, strides, batch, time, head):
    """Where rows of a [b, t, h, p] tensor start; `time` in 64 bits."""
    return ptr + batch.to(tl.int64) * strides[0] + time * strides[1] + head * strides[2]


@triton.jit
def load_rows(ptr_r, exists_r, P: tl.constexpr):
    """[r, P]; zeros for rows that do not exist."""
    return tl.load(ptr_r[:, None] + tl.arange(0, P)[None, :], mask=exists_r[:, None], other=0.0)


@triton.jit
def store_rows(ptr_r, exists_r, x_rp, P: tl.constexpr):
    ptr_rp = ptr_r[:, None] + tl.arange(0, P)[None, :]
    tl.store(ptr_rp, x_rp.to(ptr_r.dtype.element_ty), mask=exists_r[:, None])


@triton.jit
def rows_of_queries(ptr, strides, batch, first, kv_head, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Where the rows of a query tile that begins at position `first` start, in a [b, t, h, p] tensor."""
    row_r = tl.arange(0, BLOCK_Q)
    ptr += batch.to(tl.int64) * strides[0] + first.to(tl.int64) * strides[1] + kv_head * GROUP * strides[2]
    return ptr + (row_r // GROUP * strides[1] + row_r % GROUP * strides[2])


@triton.jit
def load_tile(tiles, batch, row, head, ROWS: tl.constexpr, P: tl.constexpr):
    """[ROWS, P] of one head of a [b, t, h, p] tensor, zeros before and after its rows.

    tiles: a descriptor, for GPUs that copy tiles without the help of threads; or (pointer, strides, number of rows).
    """
    if isinstance(tiles, tl.core.tensor_descriptor_base):
        x_np = tiles.load([batch, row, head, 0]).reshape([ROWS, P])
    else:
        ptr, strides, num_rows = tiles
        row_n = row + tl.arange(0, ROWS)
        ptr_n = row_of(ptr, strides, batch, row_n.to(tl.int64), head)
        x_np = load_rows(ptr_n, (row_n >= 0) & (row_n < num_rows), P)
    return x_np


@triton.jit
def store_tile(tiles, batch, row, head, x_np, ROWS: tl.constexpr, P: tl.constexpr):
    """The reverse of load_tile: rows before the first and after the last are left out."""
    if isinstance(tiles, tl.core.tensor_descriptor_base):
        tiles.store([batch, row, head, 0], x_np.to(tiles.dtype).reshape([1, ROWS, 1, P]))
    else:
        ptr, strides, num_rows = tiles
        row_n = row + tl.arange(0, ROWS)
        ptr_n = row_of(ptr, strides, batch, row_n.to(tl.int64), head)
        store_rows(ptr_n, (row_n >= 0) & (row_n < num_rows), x_np, P)


@triton.jit
def query_tile(tile, num_queries, chunk_size, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(chunk, first position, last position, position of each row, whether it exists)."""
    tiles_per_chunk = tl.cdiv(chunk_size, BLOCK_Q // GROUP)
    chunk = tile // tiles_per_chunk
    first = chunk * chunk_size + (tile % tiles_per_chunk) * (BLOCK_Q // GROUP)
    end = tl.minimum(tl.minimum(first + BLOCK_Q // GROUP, (chunk + 1) * chunk_size), num_queries)
    row_r = tl.arange(0, BLOCK_Q)
    position_r = first + row_r // GROUP
    return chunk, first, end - 1, position_r, position_r < end


@triton.jit
def load_doc(docs_ptr, position, exists, ABSENT: tl.constexpr):
    return tl.load(docs_ptr + position, mask=exists, other=ABSENT).to(tl.int32)


@triton.jit
def extremes(doc, exists):
    """The lowest and highest document of those that exist."""
    return tl.min(tl.where(exists, doc, 2**31 - 1)), tl.max(tl.where(exists, doc, -(2**31)))


@triton.jit
def documents_before(docs_ptr, doc_r, exists_r, first, last, reach):
    """(first position whose document a query of first .. last may be in, from where on all are in one document).

    Both are found within `reach` positions before first. The second is after first if the queries are in several.
    """
    low, high = extremes(doc_r, exists_r)
    oldest = tl.maximum(first - reach, 0)
    start, same = first, oldest
    for begin in range(oldest, last + 1, SCANNED):
        position = begin + tl.arange(0, SCANNED)
        exists = position <= last
        doc = load_doc(docs_ptr, position, exists, -1)
        start = tl.minimum(start, tl.min(tl.where(exists & (doc >= low) & (doc <= high), position, first)))
        same = tl.maximum(same, tl.max(tl.where(exists & (doc != high), position + 1, oldest)))
    return start, same


@triton.jit
def places_read(docs_ptr, doc_r, exists_r, first, last, window_size, lowest, fading_lowest):
    """Places whose keys the queries first .. last read: [start, end) and, of the fading memory, [fading_start, end).

    Tiles in [inner, inner_end) and [fading_inner, inner_end) are read whole by all of these queries.
    Returns: start, fading_start, end, inner, fading_inner, inner_end.
    """
    inner = last - window_size + 1
    fading_inner = inner
    if docs_ptr is not None:
        lowest, same = documents_before(docs_ptr, doc_r, exists_r, first, last, 2 * window_size)
        fading_lowest = lowest + window_size
        inner, fading_inner = tl.maximum(inner, same), tl.maximum(inner, same + window_size)
    start = tl.maximum(first - window_size + 1, lowest)
    return start, tl.maximum(start, fading_lowest), last + 1, inner, fading_inner, first + 1


@triton.jit
def in_window(query, place, window_size):
    return (place <= query) & (place > query - window_size)


@triton.jit
def hide(score_rn, place, place_n, inner, inner_end, end, position_r, doc_r, docs_ptr, age, window_size):
    """-inf for keys that a query does not read; a tile of keys in [inner, inner_end) needs nothing.

    end: after the last query.  age: 0 for the window's keys, W for those of the fading memory.
    """
    if (place < inner) | (place + score_rn.shape[1] > inner_end):
        allowed_rn = in_window(position_r[:, None], place_n[None, :], window_size)
        if docs_ptr is not None:
            allowed_rn &= doc_r[:, None] == load_doc(docs_ptr, place_n - age, place_n < end, -2)[None, :]
        score_rn = tl.where(allowed_rn, score_rn, float("-inf"))
    return score_rn


@triton.jit
def raise_max(max_r, highest_r):
    """(the running maximum after scores of at most highest_r, the factor for what was added up before)."""
    new_max_r = tl.maximum(max_r, highest_r)
    return new_max_r, tl.math.exp2(max_r - new_max_r)


@triton.jit
def add_values(score_rn, v_np, max_r, out_rp, sum_r, scale_log2):
    prob_rn = tl.math.exp2(score_rn * scale_log2 - max_r[:, None])
    return dot(prob_rn.to(v_np.dtype), v_np, out_rp), sum_r + tl.sum(prob_rn, 1)


@triton.jit
def softmax_step(q_rp, k_np, v_np, allowed_rn, out_rp, max_r, sum_r, scale_log2):
    """Take one tile of keys into the running softmax (online: arXiv:2205.14135, algorithm 1, with 2 as the base)."""
    score_rn = tl.where(allowed_rn, dot(q_rp, tl.trans(k_np)), float("-inf"))
    max_r, shrink_r = raise_max(max_r, tl.max(score_rn, 1) * scale_log2)
    out_rp, sum_r = add_values(score_rn, v_np, max_r, out_rp * shrink_r[:, None], sum_r * shrink_r, scale_log2)
    return out_rp, max_r, sum_r


@triton.jit
def attend_set(
    q_rp, k_tiles, v_tiles, batch, kv_head, start, end, inner, inner_end, rows_before, position_r, doc_r, docs_ptr,
    age, window_size, out_rp, max_r, sum_r, scale_log2, BLOCK_K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """softmax_step over the places [start, end) of the window (age 0) or the fading memory (age W)."""
    for place in range(start, end, BLOCK_K):
        place_n = place + tl.arange(0, BLOCK_K)
        k_np = load_tile(k_tiles, batch, place + rows_before, kv_head, BLOCK_K, P)
        v_np = load_tile(v_tiles, batch, place + rows_before, kv_head, BLOCK_K, P)
        score_rn = dot(q_rp, tl.trans(k_np))
        score_rn = hide(score_rn, place, place_n, inner, inner_end, end, position_r, doc_r, docs_ptr, age, window_size)
        max_r, shrink_r = raise_max(max_r, tl.max(score_rn, 1) * scale_log2)
        out_rp, sum_r = add_values(score_rn, v_np, max_r, out_rp * shrink_r[:, None], sum_r * shrink_r, scale_log2)
    return out_rp, max_r, sum_r


# Sizes on which no specialised code depends
SIZES = [
    "num_queries", "window_size", "chunk_size", "num_chunks", "lowest", "fading_lowest", "rows_before",
    "fading_rows_before",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_tiles, v_tiles, fading_k_tiles, fading_v_tiles, eidetic_q_ptr, eidetic_k_ptr, eidetic_v_ptr, index_ptr,
    docs_ptr, out_ptr, lse_ptr,
    q_strides, eidetic_q_strides, eidetic_k_strides, eidetic_v_strides, out_strides, lse_strides,
    num_queries, window_size, chunk_size, num_chunks, lowest, fading_lowest, rows_before, fading_rows_before,
    scale_log2,
    NUM_SLOTS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out and lse, the base-2 logarithm of the softmax's denominator, of one query tile. Grid: tiles, kv heads, b.

    lowest, fading_lowest: the first places whose keys are read.  rows_before, fading_rows_before: rows of the keys
    that lie before place 0.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the tiles that read most keys first
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    chunk, first, last, position_r, exists_r = query_tile(tile, num_queries, chunk_size, GROUP, BLOCK_Q)
    doc_r = None
    if docs_ptr is not None:
        docs_ptr += batch.to(tl.int64) * num_queries
        doc_r = load_doc(docs_ptr, position_r, exists_r, -1)
    start, fading_start, end, inner, fading_inner, inner_end = places_read(
        docs_ptr, doc_r, exists_r, first, last, window_size, lowest, fading_lowest
    )

    out_rp = tl.zeros([BLOCK_Q, P], tl.float32)
    max_r = tl.full([BLOCK_Q], UNSEEN, tl.float32)
    sum_r = tl.where(exists_r, 0.0, 1.0)  # rows that do not exist may read nothing, and are divided too
    q_ptr_r = rows_of_queries(q_ptr, q_strides, batch, first, kv_head, GROUP, BLOCK_Q)
    q_rp = load_rows(q_ptr_r, exists_r, P)
    out_rp, max_r, sum_r = attend_set(
        q_rp, k_tiles, v_tiles, batch, kv_head, start, end, inner, inner_end,
        rows_before, position_r, doc_r, docs_ptr, 0, window_size, out_rp, max_r, sum_r, scale_log2, BLOCK_K, P,
    )  # fmt: skip
    if fading_k_tiles is not None:
        out_rp, max_r, sum_r = attend_set(
            q_rp, fading_k_tiles, fading_v_tiles, batch, kv_head, fading_start, end, fading_inner, inner_end,
            fading_rows_before, position_r, doc_r, docs_ptr, window_size, window_size, out_rp, max_r, sum_r,
            scale_log2, BLOCK_K, P,
        )  # fmt: skip
    if eidetic_k_ptr is not None:
        q_rp = load_rows(
            rows_of_queries(eidetic_q_ptr, eidetic_q_strides, batch, first, kv_head, GROUP, BLOCK_Q), exists_r, P
        )
        index_ptr += (batch.to(tl.int64) * num_chunks + chunk) * NUM_SLOTS
        for slot in range(0, NUM_SLOTS, BLOCK_M):
            row_m, full_m = load_slots(index_ptr, slot, NUM_SLOTS, BLOCK_M)
            allowed_rm = full_m[None, :]
            if docs_ptr is not None:
                allowed_rm = allowed_rm & (doc_r == tl.load(docs_ptr + chunk * chunk_size).to(tl.int32))[:, None]
            k_mp = load_rows(row_of(eidetic_k_ptr, eidetic_k_strides, batch, row_m, kv_head), full_m, P)
            v_mp = load_rows(row_of(eidetic_v_ptr, eidetic_v_strides, batch, row_m, kv_head), full_m, P)
            out_rp, max_r, sum_r = softmax_step(q_rp, k_mp, v_mp, allowed_rm, out_rp, max_r, sum_r, scale_log2)

    store_rows(
        rows_of_queries(out_ptr, out_strides, batch, first, kv_head, GROUP, BLOCK_Q),
        exists_r,
        out_rp / sum_r[:, None],
        P,
    )
    lse_ptr_r = rows_of_queries(lse_ptr, lse_strides, batch, first, kv_head, GROUP, BLOCK_Q)
    tl.store(lse_ptr_r, max_r + tl.math.log2(sum_r), mask=exists_r)


@triton.jit
def load_slots(index_ptr, slot, NUM_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """(row of each slot, whether it holds one)."""
    slot_m = slot + tl.arange(0, BLOCK)
    row_m = tl.load(index_ptr + slot_m, mask=slot_m < NUM_SLOTS, other=-1).to(tl.int64)
    return row_m, row_m >= 0

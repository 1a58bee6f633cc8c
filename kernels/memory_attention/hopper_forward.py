"""Device code of memory attention's forward pass on Hopper. Names: hopper_tiles.py, triton_forward.py."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.memory_attention.hopper_tiles import (
    DOWN,
    LEFT,
    OF_ROW,
    PRODUCT,
    ROWS,
    TEAMS,
    UNSEEN,
    await_emptied,
    await_slots,
    await_tiles,
    copy_slots,
    fetch_of_sets,
    first_product,
    hide,
    let_go,
    load_doc,
    load_rows,
    new_ring,
    new_slots,
    places_read,
    product,
    query_tile,
    rows_of_queries,
    slots_allowed,
    store_rows,
)

SIZES = [
    "num_queries", "window_size", "chunk_size", "num_chunks", "lowest", "fading_lowest", "rows_before",
    "fading_rows_before",
]  # fmt: skip


@gluon.jit
def softmax_step(score_rn, v_np, out_rp, max_r, sum_r, scale_log2):
    """Take one tile of keys into the running softmax."""
    new_max_r = gl.maximum(max_r, gl.max(score_rn, 1) * scale_log2)
    shrink_r = gl.exp2(max_r - new_max_r)
    prob_rn = gl.exp2(score_rn * scale_log2 - new_max_r[:, None])
    sum_r = sum_r * shrink_r + gl.sum(prob_rn, 1)
    prob_rn = gl.convert_layout(prob_rn.to(v_np.dtype), LEFT)
    return product(prob_rn, v_np, out_rp * shrink_r[:, None]), new_max_r, sum_r


@gluon.jit
def attend(
    TEAM: gl.constexpr, given, NUM_SLOTS: gl.constexpr, GROUP: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """out and lse of one team's queries."""
    (
        q_ptr, q_strides, eidetic_q_ptr, eidetic_q_strides, eidetic_k_ptr, eidetic_k_strides, eidetic_v_ptr,
        eidetic_v_strides, index_ptr, docs_ptr, out_ptr, out_strides, lse_ptr, lse_strides, sets, ring, slots, batch,
        kv_head, chunk_start, first, end, starts, rows, num_window, num_tiles, window_size, lowest, fading_lowest,
        scale_log2,
    ) = given  # fmt: skip
    for n in gl.static_range(AHEAD):
        if n % TEAMS == TEAM:
            fetch_of_sets(n, sets, ring, batch, kv_head, rows, num_window, num_tiles, P, STAGES)
    if index_ptr is not None:
        copy_slots(
            TEAM, 0, index_ptr, eidetic_k_ptr, eidetic_k_strides, eidetic_v_ptr, eidetic_v_strides, batch, kv_head,
            slots, NUM_SLOTS, P,
        )  # fmt: skip
    first += TEAM * (ROWS // GROUP)
    last = gl.minimum(first + ROWS // GROUP, end) - 1
    own_start, own_fading_start, inner, fading_inner = places_read(
        docs_ptr, first, last, window_size, lowest, fading_lowest
    )
    position_r = first + gl.arange(0, ROWS, layout=DOWN) // GROUP
    doc_r = position_r
    if docs_ptr is not None:
        doc_r = load_doc(docs_ptr, position_r, position_r <= last, -1)
    row_r = gl.arange(0, ROWS, layout=OF_ROW)
    exists_r = first + row_r // GROUP <= last

    q_ptr_r = rows_of_queries(q_ptr, q_strides, batch, first, kv_head, row_r, GROUP)
    q_rp = gl.convert_layout(load_rows(q_ptr_r, exists_r, P), LEFT)
    out_rp = gl.zeros([ROWS, P], gl.float32, layout=PRODUCT)
    max_r = gl.full([ROWS], UNSEEN, gl.float32, layout=DOWN)
    sum_r = gl.where(position_r <= last, 0.0, 1.0)  # rows that do not exist may read nothing, and are divided too
    start, fading_start = starts
    for n in range(num_tiles):
        if (n + AHEAD) % TEAMS == TEAM:
            fetch_of_sets(n + AHEAD, sets, ring, batch, kv_head, rows, num_window, num_tiles, P, STAGES)
        k_np, v_np = await_tiles(n, ring, P, STAGES)
        is_fading = n >= num_window
        place = gl.where(is_fading, fading_start - num_window * ROWS, start) + n * ROWS
        if (place + ROWS > gl.where(is_fading, own_fading_start, own_start)) & (place <= last):
            score_rn = first_product(q_rp, k_np.permute((1, 0)))
            score_rn = hide(
                score_rn, place, gl.where(is_fading, fading_inner, inner), first, last, position_r, doc_r, docs_ptr,
                gl.where(is_fading, window_size, 0), window_size,
            )  # fmt: skip
            out_rp, max_r, sum_r = softmax_step(score_rn, v_np, out_rp, max_r, sum_r, scale_log2)
        let_go(n, ring, STAGES)

    if index_ptr is not None:
        q_ptr_r = rows_of_queries(eidetic_q_ptr, eidetic_q_strides, batch, first, kv_head, row_r, GROUP)
        q_rp = gl.convert_layout(load_rows(q_ptr_r, exists_r, P), LEFT)
        for slot in gl.static_range(0, NUM_SLOTS, ROWS):
            allowed_rm = slots_allowed(index_ptr, slot, docs_ptr, doc_r, chunk_start, NUM_SLOTS)
            k_mp, v_mp = await_slots(slot, slots)
            score_rm = gl.where(allowed_rm, first_product(q_rp, k_mp.permute((1, 0))), float("-inf"))
            out_rp, max_r, sum_r = softmax_step(score_rm, v_mp, out_rp, max_r, sum_r, scale_log2)
            if slot + ROWS < NUM_SLOTS:
                await_emptied(slot, slots)
                copy_slots(
                    TEAM, slot + ROWS, index_ptr, eidetic_k_ptr, eidetic_k_strides, eidetic_v_ptr, eidetic_v_strides,
                    batch, kv_head, slots, NUM_SLOTS, P,
                )  # fmt: skip

    out_ptr_r = rows_of_queries(out_ptr, out_strides, batch, first, kv_head, row_r, GROUP)
    store_rows(out_ptr_r, exists_r, out_rp / sum_r[:, None], P)
    row_r = gl.arange(0, ROWS, layout=DOWN)
    lse_ptr_r = rows_of_queries(lse_ptr, lse_strides, batch, first, kv_head, row_r, GROUP)
    gl.store(lse_ptr_r, max_r + gl.log2(sum_r), mask=position_r <= last)


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_tiles, v_tiles, fading_k_tiles, fading_v_tiles, eidetic_q_ptr, eidetic_k_ptr, eidetic_v_ptr, index_ptr,
    docs_ptr, out_ptr, lse_ptr,
    q_strides, eidetic_q_strides, eidetic_k_strides, eidetic_v_strides, out_strides, lse_strides,
    num_queries, window_size, chunk_size, num_chunks, lowest, fading_lowest, rows_before, fading_rows_before,
    scale_log2,
    NUM_SLOTS: gl.constexpr, GROUP: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """As forward_kernel in triton_forward.py, two tiles of queries per program."""
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    kv_head, batch = gl.program_id(1), gl.program_id(2)
    chunk, first, end = query_tile(tile, num_queries, chunk_size, GROUP)
    if docs_ptr is not None:
        docs_ptr += batch.to(gl.int64) * num_queries
    start, fading_start, _, _ = places_read(docs_ptr, first, end - 1, window_size, lowest, fading_lowest)
    num_window = gl.cdiv(end - start, ROWS)
    num_tiles = num_window
    if fading_k_tiles is not None:
        num_tiles += gl.maximum(gl.cdiv(end - fading_start, ROWS), 0)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    ring = new_ring(dtype, P, STAGES, TEAMS)
    slots = ring  # none
    if index_ptr is not None:
        slots = new_slots(dtype, P)
        index_ptr += (batch.to(gl.int64) * num_chunks + chunk) * NUM_SLOTS
    sets = (k_tiles, v_tiles, fading_k_tiles, fading_v_tiles)
    given = (
        q_ptr, q_strides, eidetic_q_ptr, eidetic_q_strides, eidetic_k_ptr, eidetic_k_strides, eidetic_v_ptr,
        eidetic_v_strides, index_ptr, docs_ptr, out_ptr, out_strides, lse_ptr, lse_strides, sets, ring, slots, batch,
        kv_head, chunk * chunk_size, first, end, (start, fading_start),
        (start + rows_before, fading_start + fading_rows_before), num_window, num_tiles, window_size, lowest,
        fading_lowest, scale_log2,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (attend, (0, given, NUM_SLOTS, GROUP, P, STAGES, AHEAD)),
            (attend, (1, given, NUM_SLOTS, GROUP, P, STAGES, AHEAD)),
        ],
        [4],
        [REGISTERS],
    )

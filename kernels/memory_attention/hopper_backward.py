"""Device code of memory attention's backward pass on Hopper. Names: hopper_tiles.py, triton_backward.py."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.memory_attention.hopper_forward import SIZES
from kernels.memory_attention.hopper_tiles import (
    ACROSS,
    DOWN,
    IN_SHARED,
    LEFT,
    LINE,
    OF_ROW,
    PRODUCT,
    ROWS,
    SCANNED,
    TEAMS,
    await_emptied,
    await_slots,
    await_tiles,
    copy_slots,
    fetch,
    fetch_of_sets,
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

NUMBERS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3))  # lse and delta
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
UNIT = gl.constexpr(4)  # positions at multiples of which a tile of lse or delta may begin: 16 bytes
KEY_TEAMS = gl.constexpr(3)  # that share the queries of a key tile


@gluon.jit
def two_products(a, b, c, d):
    """a b and c d, on their way."""
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=PRODUCT)
    first = warpgroup_mma(a, b, zeros, use_acc=False, is_async=True)
    return first, warpgroup_mma(c, d, zeros, use_acc=False, is_async=True)


@gluon.jit
def put(shared, x_rp):
    """Rows into shared memory, where products read them."""
    shared.store(x_rp)
    fence_async_shared()


@gluon.jit
def query_step(score_rn, grad_prob_rn, lse_r, delta_r, k_np, grad_q_rp, scale_log2):
    """grad_q + dS K of one tile of keys; grad_prob_rn: still on its way."""
    prob_rn = gl.exp2(score_rn * scale_log2 - lse_r[:, None])
    grad_prob_rn = warpgroup_mma_wait(0, deps=(grad_prob_rn,))
    grad_score_rn = prob_rn * (grad_prob_rn - delta_r[:, None])
    return product(gl.convert_layout(grad_score_rn.to(k_np.dtype), LEFT), k_np, grad_q_rp)


@gluon.jit
def query_gradients(
    TEAM: gl.constexpr, given, NUM_SLOTS: gl.constexpr, GROUP: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """Gradients and delta of one team's queries."""
    (
        q_ptr, q_strides, eidetic_q_ptr, eidetic_q_strides, eidetic_k_ptr, eidetic_k_strides, eidetic_v_ptr,
        eidetic_v_strides, index_ptr, docs_ptr, out_ptr, out_strides, lse_ptr, lse_strides, sets, ring, slots, batch,
        kv_head, chunk_start, first, end, starts, rows, num_window, num_tiles, window_size, lowest, fading_lowest,
        scale_log2, scale, grad_out_ptr, grad_out_strides, delta_ptr, grad_q_ptr, grad_eidetic_q_ptr, held,
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

    q_s, grad_out_s = held.index(2 * TEAM), held.index(2 * TEAM + 1)
    grad_out_rp = load_rows(
        rows_of_queries(grad_out_ptr, grad_out_strides, batch, first, kv_head, row_r, GROUP), exists_r, P
    )
    out_rp = load_rows(rows_of_queries(out_ptr, out_strides, batch, first, kv_head, row_r, GROUP), exists_r, P)
    delta_r = gl.sum(grad_out_rp.to(gl.float32) * out_rp.to(gl.float32), 1)
    gl.store(rows_of_queries(delta_ptr, lse_strides, batch, first, kv_head, row_r, GROUP), delta_r, mask=exists_r)
    delta_r = gl.convert_layout(delta_r, DOWN)
    put(grad_out_s, grad_out_rp)
    put(q_s, load_rows(rows_of_queries(q_ptr, q_strides, batch, first, kv_head, row_r, GROUP), exists_r, P))
    lse_ptr_r = rows_of_queries(lse_ptr, lse_strides, batch, first, kv_head, gl.arange(0, ROWS, layout=DOWN), GROUP)
    lse_r = gl.load(lse_ptr_r, mask=position_r <= last, other=0.0)

    grad_q_rp = gl.zeros([ROWS, P], gl.float32, layout=PRODUCT)
    start, fading_start = starts
    for n in range(num_tiles):
        if (n + AHEAD) % TEAMS == TEAM:
            fetch_of_sets(n + AHEAD, sets, ring, batch, kv_head, rows, num_window, num_tiles, P, STAGES)
        k_np, v_np = await_tiles(n, ring, P, STAGES)
        is_fading = n >= num_window
        place = gl.where(is_fading, fading_start - num_window * ROWS, start) + n * ROWS
        if (place + ROWS > gl.where(is_fading, own_fading_start, own_start)) & (place <= last):
            score_rn, grad_prob_rn = two_products(q_s, k_np.permute((1, 0)), grad_out_s, v_np.permute((1, 0)))
            score_rn = warpgroup_mma_wait(1, deps=(score_rn,))
            score_rn = hide(
                score_rn, place, gl.where(is_fading, fading_inner, inner), first, last, position_r, doc_r, docs_ptr,
                gl.where(is_fading, window_size, 0), window_size,
            )  # fmt: skip
            grad_q_rp = query_step(score_rn, grad_prob_rn, lse_r, delta_r, k_np, grad_q_rp, scale_log2)
        let_go(n, ring, STAGES)
    grad_q_ptr_r = rows_of_queries(grad_q_ptr, out_strides, batch, first, kv_head, row_r, GROUP)
    store_rows(grad_q_ptr_r, exists_r, grad_q_rp * scale, P)

    if index_ptr is not None:
        q_ptr_r = rows_of_queries(eidetic_q_ptr, eidetic_q_strides, batch, first, kv_head, row_r, GROUP)
        put(q_s, load_rows(q_ptr_r, exists_r, P))
        grad_q_rp = gl.zeros([ROWS, P], gl.float32, layout=PRODUCT)
        for slot in gl.static_range(0, NUM_SLOTS, ROWS):
            allowed_rm = slots_allowed(index_ptr, slot, docs_ptr, doc_r, chunk_start, NUM_SLOTS)
            k_mp, v_mp = await_slots(slot, slots)
            score_rm, grad_prob_rm = two_products(q_s, k_mp.permute((1, 0)), grad_out_s, v_mp.permute((1, 0)))
            score_rm = gl.where(allowed_rm, warpgroup_mma_wait(1, deps=(score_rm,)), float("-inf"))
            grad_q_rp = query_step(score_rm, grad_prob_rm, lse_r, delta_r, k_mp, grad_q_rp, scale_log2)
            if slot + ROWS < NUM_SLOTS:
                await_emptied(slot, slots)
                copy_slots(
                    TEAM, slot + ROWS, index_ptr, eidetic_k_ptr, eidetic_k_strides, eidetic_v_ptr, eidetic_v_strides,
                    batch, kv_head, slots, NUM_SLOTS, P,
                )  # fmt: skip
        grad_q_ptr_r = rows_of_queries(grad_eidetic_q_ptr, out_strides, batch, first, kv_head, row_r, GROUP)
        store_rows(grad_q_ptr_r, exists_r, grad_q_rp * scale, P)


@gluon.jit(do_not_specialize=SIZES)
def query_grad_kernel(
    q_ptr, k_tiles, v_tiles, fading_k_tiles, fading_v_tiles, eidetic_q_ptr, eidetic_k_ptr, eidetic_v_ptr, index_ptr,
    docs_ptr, out_ptr, lse_ptr, grad_out_ptr, delta_ptr, grad_q_ptr, grad_eidetic_q_ptr,
    q_strides, eidetic_q_strides, eidetic_k_strides, eidetic_v_strides, out_strides, lse_strides, grad_out_strides,
    num_queries, window_size, chunk_size, num_chunks, lowest, fading_lowest, rows_before, fading_rows_before,
    scale, scale_log2,
    NUM_SLOTS: gl.constexpr, GROUP: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """As query_grad_kernel in triton_backward.py, two tiles of queries per program."""
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
    held = gl.allocate_shared_memory(dtype, [2 * TEAMS, ROWS, P], IN_SHARED)
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
        fading_lowest, scale_log2, scale, grad_out_ptr, grad_out_strides, delta_ptr, grad_q_ptr, grad_eidetic_q_ptr,
        held,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (query_gradients, (0, given, NUM_SLOTS, GROUP, P, STAGES, AHEAD)),
            (query_gradients, (1, given, NUM_SLOTS, GROUP, P, STAGES, AHEAD)),
        ],
        [4],
        [REGISTERS],
    )


@gluon.jit
def documents_after(docs_ptr, first, last, begin, end):
    """As in triton_backward.py, of keys at the positions first .. last."""
    position = first + gl.arange(0, SCANNED, layout=LINE)
    exists = position <= last
    doc = load_doc(docs_ptr, position, exists, -1)
    low = gl.min(gl.where(exists, doc, 2**31 - 1), 0)
    high = gl.max(gl.where(exists, doc, -(2**31)), 0)
    read, same = begin, gl.where(low == high, end, begin)
    for start in range(begin, end, SCANNED):
        position = start + gl.arange(0, SCANNED, layout=LINE)
        exists = position < end
        doc = load_doc(docs_ptr, position, exists, -1)
        read = gl.maximum(read, gl.max(gl.where(exists & (doc >= low) & (doc <= high), position + 1, begin), 0))
        same = gl.minimum(same, gl.min(gl.where(exists & (doc != high), position, end), 0))
    return read, same


@gluon.jit
def fetch_queries(
    n, query_tiles, ring, numbers, batch, first_head, start, per_head, num_tiles, P: gl.constexpr, STAGES: gl.constexpr
):
    """fetch the n-th tiles of queries and grad_out, and their lse and delta: of one head after another."""
    q_tiles, grad_out_tiles, lse_tiles, delta_tiles = query_tiles
    lse_s, delta_s = numbers
    ready = ring[2]
    if n < num_tiles:
        time, head = start + n % per_head * ROWS, first_head + n // per_head
        place = n % STAGES
        fetch(n, q_tiles, grad_out_tiles, ring, batch, time, head, P, STAGES, 2 * ROWS * 4)
        tma.async_copy_global_to_shared(lse_tiles, [batch, head, time], ready.index(place), lse_s.index(place))
        tma.async_copy_global_to_shared(delta_tiles, [batch, head, time], ready.index(place), delta_s.index(place))


@gluon.jit
def load_number(numbers, n, STAGES: gl.constexpr):
    """[ROWS] of lse or delta, across."""
    return numbers.index(n % STAGES)._reinterpret(gl.float32, [ROWS], PLAIN).load(ACROSS)


@gluon.jit
def key_gradients(TEAM: gl.constexpr, given, P: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr):
    """Gradients of one team's keys and values."""
    (
        query_tiles, ring, numbers, held, docs_ptr, k_ptr, k_strides, v_ptr, v_strides, grad_k_ptr, grad_v_ptr,
        grad_strides, batch, kv_head, first_head, row, start, end, per_head, num_tiles, num_queries, lowest,
        window_size, age, rows_before, scale, scale_log2,
    ) = given  # fmt: skip
    for n in gl.static_range(AHEAD):
        if n % KEY_TEAMS == TEAM:
            fetch_queries(n, query_tiles, ring, numbers, batch, first_head, start, per_head, num_tiles, P, STAGES)
    row += TEAM * ROWS
    first = row - rows_before
    last = gl.minimum(first + ROWS, num_queries) - 1
    row_n = gl.arange(0, ROWS, layout=OF_ROW)
    exists_n = first + row_n <= last
    k_s, v_s = held.index(2 * TEAM), held.index(2 * TEAM + 1)
    k_ptr += batch.to(gl.int64) * k_strides[0] + row.to(gl.int64) * k_strides[1] + kv_head * k_strides[2]
    v_ptr += batch.to(gl.int64) * v_strides[0] + row.to(gl.int64) * v_strides[1] + kv_head * v_strides[2]
    put(k_s, load_rows(k_ptr + row_n * k_strides[1], exists_n, P))
    put(v_s, load_rows(v_ptr + row_n * v_strides[1], exists_n, P))

    place_n = first + gl.arange(0, ROWS, layout=DOWN)
    doc_n = place_n
    own_end = gl.minimum(last + window_size, end)
    inner_end = first + window_size  # read by all from `last` on
    if docs_ptr is not None:
        doc_n = load_doc(docs_ptr, place_n - age, place_n <= last, -2)
        own_end, same = documents_after(docs_ptr, first - age, last - age, start, own_end)
        inner_end = gl.minimum(inner_end, same)
    grad_k_np = gl.zeros([ROWS, P], gl.float32, layout=PRODUCT)
    grad_v_np = gl.zeros([ROWS, P], gl.float32, layout=PRODUCT)
    for n in range(num_tiles):
        if (n + AHEAD) % KEY_TEAMS == TEAM:
            fetch_queries(
                n + AHEAD, query_tiles, ring, numbers, batch, first_head, start, per_head, num_tiles, P, STAGES
            )
        q_rp, grad_out_rp = await_tiles(n, ring, P, STAGES)
        time = start + n % per_head * ROWS
        if (time + ROWS > first) & (time < own_end):
            score_nr, grad_prob_nr = two_products(k_s, q_rp.permute((1, 0)), v_s, grad_out_rp.permute((1, 0)))
            lse_r = load_number(numbers[0], n, STAGES)
            score_nr = warpgroup_mma_wait(1, deps=(score_nr,))
            if (time < last) | (time + ROWS > inner_end):
                time_r = time + gl.arange(0, ROWS, layout=ACROSS)
                allowed_nr = (place_n[:, None] <= time_r[None, :]) & (place_n[:, None] > time_r[None, :] - window_size)
                if docs_ptr is not None:
                    allowed_nr &= load_doc(docs_ptr, time_r, time_r < end, -1)[None, :] == doc_n[:, None]
                score_nr = gl.where(allowed_nr, score_nr, float("-inf"))
            prob_nr = gl.exp2(score_nr * scale_log2 - lse_r[None, :])
            left = gl.convert_layout(prob_nr.to(q_rp.dtype), LEFT)
            delta_r = load_number(numbers[1], n, STAGES)
            grad_v_np = warpgroup_mma(left, grad_out_rp, grad_v_np, is_async=True)
            grad_prob_nr = warpgroup_mma_wait(1, deps=(grad_prob_nr,))
            grad_score_nr = prob_nr * (grad_prob_nr - delta_r[None, :])
            grad_left = gl.convert_layout(grad_score_nr.to(q_rp.dtype), LEFT)
            grad_k_np = warpgroup_mma(grad_left, q_rp, grad_k_np, is_async=True)
            grad_v_np, grad_k_np = warpgroup_mma_wait(0, deps=(grad_v_np, grad_k_np))
        let_go(n, ring, STAGES)
    read_n1 = (place_n >= lowest)[:, None]  # a key mixes with no other, so one that is not read is undone here
    grad_k_np, grad_v_np = gl.where(read_n1, grad_k_np * scale, 0.0), gl.where(read_n1, grad_v_np, 0.0)
    offset = batch.to(gl.int64) * grad_strides[0] + row.to(gl.int64) * grad_strides[1] + kv_head * grad_strides[2]
    store_rows(grad_k_ptr + offset + row_n * grad_strides[1], exists_n, grad_k_np, P)
    store_rows(grad_v_ptr + offset + row_n * grad_strides[1], exists_n, grad_v_np, P)


@gluon.jit(do_not_specialize=SIZES)
def key_grad_kernel(
    q_tiles, grad_out_tiles, lse_tiles, delta_tiles, docs_ptr, k_ptr, v_ptr, grad_k_ptr, grad_v_ptr,
    k_strides, v_strides, grad_strides,
    num_queries, lowest, window_size, age, rows_before, scale, scale_log2,
    GROUP: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As key_grad_kernel in triton_backward.py, a tile of keys per team."""
    kv_head, batch = gl.program_id(1), gl.program_id(2)
    row = gl.program_id(0) * (KEY_TEAMS * ROWS)
    first = row - rows_before
    last = gl.minimum(first + KEY_TEAMS * ROWS, num_queries) - 1
    start, end = gl.maximum(first, 0) // UNIT * UNIT, gl.minimum(last + window_size, num_queries)
    if docs_ptr is not None:
        docs_ptr += batch.to(gl.int64) * num_queries
        end, _ = documents_after(docs_ptr, first - age, last - age, start, end)
    per_head = gl.cdiv(end - start, ROWS)
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    ring = new_ring(dtype, P, STAGES, KEY_TEAMS)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, ROWS], NUMBERS)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, ROWS], NUMBERS)
    held = gl.allocate_shared_memory(dtype, [2 * KEY_TEAMS, ROWS, P], IN_SHARED)
    given = (
        (q_tiles, grad_out_tiles, lse_tiles, delta_tiles), ring, (lse_s, delta_s), held, docs_ptr, k_ptr, k_strides,
        v_ptr, v_strides, grad_k_ptr, grad_v_ptr, grad_strides, batch, kv_head, kv_head * GROUP, row, start, end,
        per_head, GROUP * per_head, num_queries, lowest, window_size, age, rows_before, scale, scale_log2,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (key_gradients, (0, given, P, STAGES, AHEAD)),
            (key_gradients, (1, given, P, STAGES, AHEAD)),
            (key_gradients, (2, given, P, STAGES, AHEAD)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )

"""Device code for Hopper, in Gluon: teams of four warps, each with 64 rows, share the tiles that go by.

Gluon is the part of Triton in which layouts, shared memory and barriers are written out. It compiles for one kind of
GPU only; triton_forward.py and triton_backward.py compute the same on all others, and names are theirs.

Tiles of 64 rows lie in a ring of STAGES places in shared memory. `ready` says that a place holds its tile, `free` that
all teams have let go of it. The teams take turns in asking the copy engine for the tile AHEAD of the one at hand. A
team waits also for tiles that it reads nothing of, so none is more than a round of the ring ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # of a tile, and of a team
TEAMS = gl.constexpr(2)  # that share the keys of a query tile
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=PRODUCT, k_width=2))
DOWN = gl.constexpr(gl.SliceLayout(1, PRODUCT))  # a number per row of a product
ACROSS = gl.constexpr(gl.SliceLayout(0, PRODUCT))  # a number per column
MEMORY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes per thread
OF_ROW = gl.constexpr(gl.SliceLayout(1, MEMORY))
OF_COLUMN = gl.constexpr(gl.SliceLayout(0, MEMORY))
LINE = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
IN_RING = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
IN_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SCANNED = gl.constexpr(1024)  # document ids that are looked at together
UNSEEN = gl.constexpr(-1e30)  # a maximum over no scores; finite, because -inf - -inf is not 0


@gluon.jit
def load_rows(ptr_r, exists_r, P: gl.constexpr):
    """[r, P], zeros for rows that do not exist; ptr_r and exists_r in OF_ROW."""
    column = gl.arange(0, P, layout=OF_COLUMN)
    return gl.load(ptr_r[:, None] + column[None, :], mask=exists_r[:, None], other=0.0)


@gluon.jit
def store_rows(ptr_r, exists_r, x_rp, P: gl.constexpr):
    column = gl.arange(0, P, layout=OF_COLUMN)
    x_rp = gl.convert_layout(x_rp.to(ptr_r.dtype.element_ty), MEMORY)
    gl.store(ptr_r[:, None] + column[None, :], x_rp, mask=exists_r[:, None])


@gluon.jit
def rows_of_queries(ptr, strides, batch, first, kv_head, row_r, GROUP: gl.constexpr):
    """Where the rows of queries from position `first` on start, in a [b, t, h, p] tensor."""
    ptr += batch.to(gl.int64) * strides[0] + first.to(gl.int64) * strides[1] + kv_head * GROUP * strides[2]
    return ptr + (row_r // GROUP * strides[1] + row_r % GROUP * strides[2])


@gluon.jit
def product(a, b, acc):
    """acc + a b; a in LEFT or in shared memory, b in shared memory."""
    return warpgroup_mma_wait(0, deps=(warpgroup_mma(a, b, acc, is_async=True),))


@gluon.jit
def first_product(a, b):
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=PRODUCT)
    return warpgroup_mma_wait(0, deps=(warpgroup_mma(a, b, zeros, use_acc=False, is_async=True),))


@gluon.jit
def new_ring(dtype: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, NUM_TEAMS: gl.constexpr):
    """(two tiles per place, ready, free), no tile in it."""
    first = gl.allocate_shared_memory(dtype, [STAGES, 1, ROWS, 1, P], IN_RING)
    second = gl.allocate_shared_memory(dtype, [STAGES, 1, ROWS, 1, P], IN_RING)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(ready.index(place), count=1)
        mbarrier.init(free.index(place), count=NUM_TEAMS)
    return first, second, ready, free


@gluon.jit
def fetch(
    n, first_tiles, second_tiles, ring, batch, row, head, P: gl.constexpr, STAGES: gl.constexpr, MORE: gl.constexpr = 0
):
    """Ask for the n-th tiles, which begin at `row`, once their place is free.

    MORE: bytes that the caller copies into the same place.
    """
    first, second, ready, free = ring
    place = n % STAGES
    mbarrier.wait(free.index(place), (n // STAGES & 1) ^ 1)  # in the first round at once
    mbarrier.expect(ready.index(place), 2 * ROWS * P * 2 + MORE)
    tma.async_copy_global_to_shared(first_tiles, [batch, row, head, 0], ready.index(place), first.index(place))
    tma.async_copy_global_to_shared(second_tiles, [batch, row, head, 0], ready.index(place), second.index(place))


@gluon.jit
def await_tiles(n, ring, P: gl.constexpr, STAGES: gl.constexpr):
    """The n-th tiles, [ROWS, P], once they are there."""
    first, second, ready, _free = ring
    place = n % STAGES
    mbarrier.wait(ready.index(place), n // STAGES & 1)
    return first.index(place).reshape([ROWS, P]), second.index(place).reshape([ROWS, P])


@gluon.jit
def let_go(n, ring, STAGES: gl.constexpr):
    """A team is done with the n-th tiles."""
    _first, _second, _ready, free = ring
    mbarrier.arrive(free.index(n % STAGES), count=1)


@gluon.jit
def fetch_of_sets(n, sets, ring, batch, head, rows, num_window, num_tiles, P: gl.constexpr, STAGES: gl.constexpr):
    """fetch the n-th tiles of keys and values: those of the window, then those of the fading memory."""
    k_tiles, v_tiles, fading_k_tiles, fading_v_tiles = sets
    row, fading_row = rows
    if n < num_window:
        fetch(n, k_tiles, v_tiles, ring, batch, row + n * ROWS, head, P, STAGES)
    elif n < num_tiles:  # noqa: SIM102  # one is known when the kernel is compiled, the other is not
        if fading_k_tiles is not None:
            fading_row += (n - num_window) * ROWS
            fetch(n, fading_k_tiles, fading_v_tiles, ring, batch, fading_row, head, P, STAGES)


@gluon.jit
def query_tile(tile, num_queries, chunk_size, GROUP: gl.constexpr):
    """(chunk, first position, position after the last) of the teams' queries together."""
    positions: gl.constexpr = TEAMS * (ROWS // GROUP)
    tiles_per_chunk = gl.cdiv(chunk_size, positions)
    chunk = tile // tiles_per_chunk
    first = chunk * chunk_size + (tile % tiles_per_chunk) * positions
    return chunk, first, gl.minimum(gl.minimum(first + positions, (chunk + 1) * chunk_size), num_queries)


@gluon.jit
def load_doc(docs_ptr, position, exists, ABSENT: gl.constexpr):
    return gl.load(docs_ptr + position, mask=exists, other=ABSENT).to(gl.int32)


@gluon.jit
def extremes(docs_ptr, first, last):
    """The lowest and highest document of the positions first .. last."""
    position = first + gl.arange(0, TEAMS * ROWS, layout=LINE)
    exists = position <= last
    doc = load_doc(docs_ptr, position, exists, -1)
    low = gl.min(gl.where(exists, doc, 2**31 - 1), 0)
    return low, gl.max(gl.where(exists, doc, -(2**31)), 0)


@gluon.jit
def documents_before(docs_ptr, first, last, reach):
    """As in triton_forward.py."""
    low, high = extremes(docs_ptr, first, last)
    oldest = gl.maximum(first - reach, 0)
    start, same = first, oldest
    for begin in range(oldest, last + 1, SCANNED):
        position = begin + gl.arange(0, SCANNED, layout=LINE)
        exists = position <= last
        doc = load_doc(docs_ptr, position, exists, -1)
        start = gl.minimum(start, gl.min(gl.where(exists & (doc >= low) & (doc <= high), position, first), 0))
        same = gl.maximum(same, gl.max(gl.where(exists & (doc != high), position + 1, oldest), 0))
    return start, same


@gluon.jit
def places_read(docs_ptr, first, last, window_size, lowest, fading_lowest):
    """(start, fading_start, inner, fading_inner), as in triton_forward.py; `end` is last + 1, inner_end first + 1."""
    inner = last - window_size + 1
    fading_inner = inner
    if docs_ptr is not None:
        lowest, same = documents_before(docs_ptr, first, last, 2 * window_size)
        fading_lowest = lowest + window_size
        inner, fading_inner = gl.maximum(inner, same), gl.maximum(inner, same + window_size)
    start = gl.maximum(first - window_size + 1, lowest)
    return start, gl.maximum(start, fading_lowest), inner, fading_inner


@gluon.jit
def hide(score_rn, place, inner, first, last, position_r, doc_r, docs_ptr, age, window_size):
    """-inf for keys that a query of first .. last does not read; tiles in [inner, first] need nothing."""
    if (place < inner) | (place + ROWS > first + 1):
        place_n = place + gl.arange(0, ROWS, layout=ACROSS)
        allowed_rn = (place_n[None, :] <= position_r[:, None]) & (place_n[None, :] > position_r[:, None] - window_size)
        if docs_ptr is not None:
            allowed_rn &= doc_r[:, None] == load_doc(docs_ptr, place_n - age, place_n <= last, -2)[None, :]
        score_rn = gl.where(allowed_rn, score_rn, float("-inf"))
    return score_rn


@gluon.jit
def copy_slots(
    TEAM: gl.constexpr, slot, index_ptr, k_ptr, k_strides, v_ptr, v_strides, batch, head, slots,
    NUM_SLOTS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Begin to copy 64 slots from `slot` on: the first team their keys, the second their values.

    Of slots that are empty, or are not there, the first row.
    """
    slot_k, slot_v, _filled, _emptied = slots
    slot_m = slot + gl.arange(0, ROWS, layout=OF_ROW)
    row_m = gl.maximum(gl.load(index_ptr + slot_m, mask=slot_m < NUM_SLOTS, other=-1).to(gl.int64), 0)
    column = gl.arange(0, P, layout=OF_COLUMN)
    if TEAM == 0:
        ptr_m = k_ptr + batch.to(gl.int64) * k_strides[0] + row_m * k_strides[1] + head * k_strides[2]
        async_copy.async_copy_global_to_shared(slot_k, ptr_m[:, None] + column[None, :])
    else:
        ptr_m = v_ptr + batch.to(gl.int64) * v_strides[0] + row_m * v_strides[1] + head * v_strides[2]
        async_copy.async_copy_global_to_shared(slot_v, ptr_m[:, None] + column[None, :])
    async_copy.commit_group()


@gluon.jit
def await_slots(slot, slots):
    """Keys and values of the slots that copy_slots began to copy last."""
    slot_k, slot_v, filled, _emptied = slots
    async_copy.wait_group(0)
    fence_async_shared()
    mbarrier.arrive(filled, count=1)
    mbarrier.wait(filled, slot // ROWS & 1)
    return slot_k, slot_v


@gluon.jit
def await_emptied(slot, slots):
    """Let go of the slots, and wait until the other team has too."""
    _slot_k, _slot_v, _filled, emptied = slots
    mbarrier.arrive(emptied, count=1)
    mbarrier.wait(emptied, slot // ROWS & 1)


@gluon.jit
def new_slots(dtype: gl.constexpr, P: gl.constexpr):
    """(keys, values, filled, emptied)."""
    k = gl.allocate_shared_memory(dtype, [ROWS, P], IN_SHARED)
    v = gl.allocate_shared_memory(dtype, [ROWS, P], IN_SHARED)
    filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(filled, count=TEAMS)
    mbarrier.init(emptied, count=TEAMS)
    return k, v, filled, emptied


@gluon.jit
def slots_allowed(index_ptr, slot, docs_ptr, doc_r, chunk_start, NUM_SLOTS: gl.constexpr):
    """[r, m]: slots that hold a row, for queries of the document of their chunk's first."""
    slot_m = slot + gl.arange(0, ROWS, layout=ACROSS)
    full_m = gl.load(index_ptr + slot_m, mask=slot_m < NUM_SLOTS, other=-1) >= 0
    allowed_rm = full_m[None, :]
    if docs_ptr is not None:
        allowed_rm = allowed_rm & (doc_r == gl.load(docs_ptr + chunk_start).to(gl.int32))[:, None]
    return allowed_rm

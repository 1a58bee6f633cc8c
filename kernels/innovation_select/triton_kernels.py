"""Device code of innovation_select: scores, their gradient, and bitonic sorting of candidates by rank.

A candidate is a pair (rank, row), ranks in float32 or float64. The higher rank comes first, of equal ranks the earlier
row; an empty slot is (-inf, -1). Lists have a power of two lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores_kernel(
    y_btd,
    weight_kd,
    past_bkd,
    doc_ids_bt,
    error_bt,
    energy_bt,
    num_rows,
    num_channels,
    y_stride_b,
    y_stride_t,
    weight_stride_k,
    weight_stride_d,
    eps,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of rows, over all channels: the earlier rows that the taps meet come from the cache."""
    blocks = tl.cdiv(num_rows, BLOCK_T)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    seen = _seen(doc_ids_bt, batch, row, num_rows, TAPS)
    error_td = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    energy_td = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for block in tl.range(0, num_channels, BLOCK_D):
        channel = block + tl.arange(0, BLOCK_D)
        y_td, taps, weight = _load_taps(
            y_btd, weight_kd, past_bkd, batch, row, channel, seen, num_rows, num_channels,
            y_stride_b, y_stride_t, weight_stride_k, weight_stride_d, TAPS,
        )  # fmt: skip
        residual_td = _residual(y_td, taps, weight, TAPS)
        error_td += residual_td * residual_td
        energy_td += y_td * y_td
    energy = tl.sum(energy_td, 1) + eps
    out = batch * num_rows + row
    tl.store(error_bt + out, tl.sum(error_td, 1) / energy, mask=row < num_rows)
    tl.store(energy_bt + out, energy, mask=row < num_rows)


@triton.jit
def scores_backward_kernel(
    y_btd,
    weight_kd,
    past_bkd,
    doc_ids_bt,
    energy_bt,
    grad_error_bt,
    grad_weight_skd,
    num_rows,
    num_channels,
    y_stride_b,
    y_stride_t,
    weight_stride_k,
    weight_stride_d,
    TAPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What a segment of rows adds to the gradient of some channels' weights."""
    segments = tl.cdiv(num_rows, SEGMENT)
    batch = (tl.program_id(0) // segments).to(tl.int64)
    first = (tl.program_id(0) % segments).to(tl.int64) * SEGMENT
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = ()
    for _ in tl.static_range(TAPS):
        total = total + (tl.zeros((BLOCK_D,), tl.float32),)
    for block in tl.range(0, SEGMENT, BLOCK_T):
        row = first + block + tl.arange(0, BLOCK_T)
        seen = _seen(doc_ids_bt, batch, row, num_rows, TAPS)
        y_td, taps, weight = _load_taps(
            y_btd, weight_kd, past_bkd, batch, row, channel, seen, num_rows, num_channels,
            y_stride_b, y_stride_t, weight_stride_k, weight_stride_d, TAPS,
        )  # fmt: skip
        at = batch * num_rows + row
        energy = tl.load(energy_bt + at, mask=row < num_rows, other=1.0)
        slope = -2 * tl.load(grad_error_bt + at, mask=row < num_rows, other=0.0) / energy
        change_td = _residual(y_td, taps, weight, TAPS) * slope[:, None]
        added = ()
        for lag in tl.static_range(TAPS):
            added = added + (total[lag] + tl.sum(change_td * taps[lag], 0),)
        total = added
    share_kd = grad_weight_skd + tl.program_id(0).to(tl.int64) * TAPS * num_channels + channel
    for lag in tl.static_range(TAPS):
        tl.store(share_kd + lag * num_channels, total[lag], mask=channel < num_channels)


@triton.jit
def leavers_kernel(
    rank_bs,
    position_bs,
    doc_ids_bs,
    rank_bjl,
    row_bjl,
    num_rows,
    num_chunks,
    first_boundary,
    first_row,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    LANES: tl.constexpr,
    LOG_LANES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The rows that leave the window at one chunk boundary, sorted, the best KEPT of them.

    first_boundary: row of the first chunk's first query.  first_row: the first row that is no slot.
    """
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, LANES)
    boundary = first_boundary + chunk * CHUNK
    row = boundary - CHUNK - WINDOW + 1 + lane
    rank, row = _candidates(
        rank_bs, position_bs, doc_ids_bs, batch, row, (lane < CHUNK) & (row >= first_row), boundary, num_rows
    )
    rank, row = sort_lanes(rank, row, lane, LOG_LANES)
    out = (batch * num_chunks + chunk) * KEPT + lane
    tl.store(rank_bjl + out, rank, mask=lane < KEPT)
    tl.store(row_bjl + out, row, mask=lane < KEPT)


@triton.jit
def merge_kernel(
    rank_bs,
    position_bs,
    doc_ids_bs,
    rank_bjl,
    row_bjl,
    index_bjm,
    num_rows,
    num_chunks,
    first_boundary,
    num_slots,
    num_eidetic,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    LOG_LANES: tl.constexpr,
    LEAVERS: tl.constexpr,
):
    """One batch element: the kept set along the chunks. LEAVERS: rows sorted for each boundary; 0 if none leave.

    Of a sorted list and a reversed one the better of each lane are the best of both, in bitonic order.
    """
    batch = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    rank, row = _candidates(rank_bs, position_bs, doc_ids_bs, batch, lane, lane < num_slots, first_boundary, num_rows)
    rank, row = sort_lanes(rank, row, lane, LOG_LANES)
    doc = _document(doc_ids_bs, batch, first_boundary, num_rows)
    for chunk in tl.range(num_chunks):
        here = _document(doc_ids_bs, batch, first_boundary + chunk * CHUNK, num_rows)
        goes_on = here == doc  # all that is kept is of one document
        rank = tl.where(goes_on, rank, float("-inf"))
        row = tl.where(goes_on, row, -1)
        doc = here
        if LEAVERS > 0:
            at = LANES - 1 - lane
            leavers = (batch * num_chunks + chunk) * LEAVERS + at
            new_rank = tl.load(rank_bjl + leavers, mask=at < LEAVERS, other=float("-inf"))
            new_row = tl.load(row_bjl + leavers, mask=at < LEAVERS, other=-1)
            better = _comes_first(new_rank, new_row, rank, row)
            rank = tl.where(better, new_rank, rank)
            row = tl.where(better, new_row, row)
            rank, row = _merge(rank, row, lane, LOG_LANES)
            rank = tl.where(lane < num_eidetic, rank, float("-inf"))
            row = tl.where(lane < num_eidetic, row, -1)
        out = index_bjm + (batch * num_chunks + chunk) * num_eidetic + lane
        tl.store(out, row.to(tl.int64), mask=lane < num_eidetic)


@triton.jit
def _seen(doc_ids_bt, batch, row, num_rows, TAPS: tl.constexpr):
    """For each tap, which rows meet an earlier row of their own document."""
    seen = ()
    for lag in tl.static_range(1, TAPS + 1):
        meets = (row < num_rows) & (row >= lag)
        if doc_ids_bt is not None:
            doc = doc_ids_bt + batch * num_rows + row
            meets = meets & (tl.load(doc, mask=meets, other=0) == tl.load(doc - lag, mask=meets, other=0))
        seen = seen + (meets,)
    return seen


@triton.jit
def _load_taps(
    y_btd,
    weight_kd,
    past_bkd,
    batch,
    row,
    channel,
    seen,
    num_rows,
    num_channels,
    y_stride_b,
    y_stride_t,
    weight_stride_k,
    weight_stride_d,
    TAPS: tl.constexpr,
):
    """Rows, the earlier rows that each tap meets, and the taps' weights."""
    inside = channel < num_channels
    at = y_btd + batch * y_stride_b + row[:, None] * y_stride_t + channel[None, :]
    y_td = tl.load(at, mask=(row < num_rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    taps = ()
    weight = ()
    for lag in tl.static_range(1, TAPS + 1):
        tap = tl.load(at - lag * y_stride_t, mask=seen[lag - 1][:, None] & inside[None, :], other=0.0).to(tl.float32)
        if past_bkd is not None:
            before = (batch * TAPS + TAPS + row - lag)[:, None] * num_channels + channel[None, :]
            of_past = (row < lag)[:, None] & inside[None, :]
            tap += tl.load(past_bkd + before, mask=of_past, other=0.0).to(tl.float32)
        taps = taps + (tap,)
        one = weight_kd + (lag - 1) * weight_stride_k + channel * weight_stride_d
        weight = weight + (tl.load(one, mask=inside, other=0.0).to(tl.float32),)
    return y_td, taps, weight


@triton.jit
def _residual(y_td, taps, weight, TAPS: tl.constexpr):
    predicted_td = taps[0] * weight[0][None, :]
    for lag in tl.static_range(1, TAPS):
        predicted_td += taps[lag] * weight[lag][None, :]
    return y_td - predicted_td


@triton.jit
def _document(doc_ids_bs, batch, row, num_rows):
    doc = tl.zeros((), tl.int64)
    if doc_ids_bs is not None:
        doc = tl.load(doc_ids_bs + batch * num_rows + row).to(tl.int64)
    return doc


@triton.jit
def _candidates(rank_bs, position_bs, doc_ids_bs, batch, row, wanted, boundary, num_rows):
    """Ranks of the wanted rows; empty if a row holds none, is never kept or is not of the boundary's document."""
    at = batch * num_rows + row
    position = tl.load(position_bs + at, mask=wanted, other=-1)
    valid = position >= 0
    if doc_ids_bs is not None:
        doc = tl.load(doc_ids_bs + at, mask=wanted, other=0)
        valid = valid & (doc == _document(doc_ids_bs, batch, boundary, num_rows))
    rank = tl.load(rank_bs + at, mask=wanted, other=0.0)
    valid = valid & (rank > float("-inf"))
    return tl.where(valid, rank, float("-inf")), tl.where(valid, row, -1).to(tl.int32)


@triton.jit
def _comes_first(rank, row, other_rank, other_row):
    return (rank > other_rank) | ((rank == other_rank) & (row < other_row))


@triton.jit
def sort_lanes(rank, row, lane, LOG_LANES: tl.constexpr):
    """Best first: sorted runs of twice the length after each round, every other run backwards."""
    for log_size in tl.range(1, LOG_LANES + 1):
        rank, row = _merge(rank, row, lane, log_size)
    return rank, row


@triton.jit
def _merge(rank, row, lane, log_size):
    """Sort bitonic runs of 2^log_size lanes: best first, and runs of odd number worst first."""
    backwards = (lane >> log_size) & 1
    for step in tl.range(log_size):
        stride = 1 << (log_size - 1 - step)
        partner = lane ^ stride
        other_rank = tl.gather(rank, partner, 0)
        other_row = tl.gather(row, partner, 0)
        is_lower = (lane & stride) == 0
        take = _comes_first(other_rank, other_row, rank, row) == (is_lower ^ (backwards != 0))
        rank = tl.where(take, other_rank, rank)
        row = tl.where(take, other_row, row)
    return rank, row

"""Device code of the eidetic memory's decoding step: one program per row, which returns soon unless a chunk begins."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.innovation_select.triton_kernels import sort_lanes


@triton.jit
def innovation_step_kernel(
    y_bd, position_b, weight_kd, past_bkd, log_e_br, k_brhp, v_brhp, slot_k_bmhp, slot_v_bmhp, slot_log_e_bm,
    slot_position_bm, given_b, score_b,
    k_strides, v_strides, slot_k_strides, slot_v_strides,
    num_channels, y_stride_b, weight_stride_k, weight_stride_d, num_heads, tau_bits, eps, lowest,
    TAPS: tl.constexpr, RING: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, LANES: tl.constexpr, LOG_LANES: tl.constexpr,
    FORGETS: tl.constexpr,
):  # fmt: skip
    """tau_bits: the bits of tau in float64, if FORGETS; a number would arrive in float32."""
    batch = tl.program_id(0).to(tl.int64)
    position = tl.load(position_b + batch)
    score = _score_and_push(
        y_bd, weight_kd, past_bkd, batch, num_channels, y_stride_b, weight_stride_k, weight_stride_d, eps, lowest,
        TAPS, BLOCK_D,
    )  # fmt: skip
    if given_b is not None:
        score = tl.load(given_b + batch).to(tl.float32)
    tl.store(score_b + batch, score.to(score_b.dtype.element_ty))
    tl.store(log_e_br + batch * RING + position % RING, score.to(log_e_br.dtype.element_ty))
    if (position % CHUNK == 0) & (position >= RING - CHUNK):
        oldest = position - RING + 1
        order = _order(
            log_e_br, slot_log_e_bm, slot_position_bm, batch, oldest, tau_bits,
            RING, CHUNK, SLOTS, LANES, LOG_LANES, FORGETS,
        )  # fmt: skip
        # From the last slot: what is kept moves to later slots only, so each is read before it is overwritten.
        for block in tl.range(tl.cdiv(SLOTS, BLOCK_M)):
            slot = (tl.cdiv(SLOTS, BLOCK_M) - 1 - block) * BLOCK_M + tl.arange(0, BLOCK_M)
            held = slot < SLOTS
            source = tl.gather(order, tl.minimum(slot, LANES - 1), 0)
            old = held & (source < SLOTS)
            new = held & (source >= SLOTS)
            left = oldest + source - SLOTS
            at = (left + RING) % RING
            log_e = tl.load(slot_log_e_bm + batch * SLOTS + source, mask=old, other=0.0)
            log_e += tl.load(log_e_br + batch * RING + at, mask=new, other=0.0)
            place = tl.load(slot_position_bm + batch * SLOTS + source, mask=old, other=0)
            place += tl.where(new, tl.maximum(left, -1), 0)
            place = tl.where(log_e > float("-inf"), place, -1)
            tl.debug_barrier()  # all are read
            tl.store(slot_log_e_bm + batch * SLOTS + slot, log_e, mask=held)
            tl.store(slot_position_bm + batch * SLOTS + slot, place, mask=held)
            for head in tl.range(num_heads):
                k_old, k_new = _rows(slot_k_bmhp, slot_k_strides, k_brhp, k_strides, batch, source, at, head)
                v_old, v_new = _rows(slot_v_bmhp, slot_v_strides, v_brhp, v_strides, batch, source, at, head)
                k = _select(k_old, k_new, old, new, P, BLOCK_P)
                v = _select(v_old, v_new, old, new, P, BLOCK_P)
                tl.debug_barrier()
                _hold(slot_k_bmhp, slot_k_strides, batch, slot, head, k, held, P, BLOCK_P)
                _hold(slot_v_bmhp, slot_v_strides, batch, slot, head, v, held, P, BLOCK_P)


@triton.jit
def _score_and_push(
    y_bd, weight_kd, past_bkd, batch, num_channels, y_stride_b, weight_stride_k, weight_stride_d, eps, lowest,
    TAPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log max(e, lowest) of the row's output, which becomes the newest of its past."""
    channel = tl.arange(0, BLOCK_D)
    inside = channel < num_channels
    past_kd = past_bkd + batch * TAPS * num_channels + channel
    y = tl.load(y_bd + batch * y_stride_b + channel, mask=inside, other=0.0)
    taps = ()
    for lag in tl.static_range(1, TAPS + 1):
        taps = taps + (tl.load(past_kd + (TAPS - lag) * num_channels, mask=inside, other=0.0),)
    precise = y.to(tl.float32)
    predicted = tl.zeros((BLOCK_D,), tl.float32)
    for lag in tl.static_range(1, TAPS + 1):
        one = weight_kd + (lag - 1) * weight_stride_k + channel * weight_stride_d
        predicted += taps[lag - 1].to(tl.float32) * tl.load(one, mask=inside, other=0.0).to(tl.float32)
    residual = precise - predicted
    error = tl.sum(residual * residual, 0) / (tl.sum(precise * precise, 0) + eps)
    for lag in tl.static_range(2, TAPS + 1):
        tl.store(past_kd + (TAPS - lag) * num_channels, taps[lag - 2], mask=inside)
    tl.store(past_kd + (TAPS - 1) * num_channels, y.to(past_bkd.dtype.element_ty), mask=inside)
    return tl.log(tl.maximum(error, lowest))


@triton.jit
def _order(
    log_e_br, slot_log_e_bm, slot_position_bm, batch, oldest, tau_bits,
    RING: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, LOG_LANES: tl.constexpr,
    FORGETS: tl.constexpr,
):  # fmt: skip
    """Candidates, best first: a number below SLOTS is a slot, SLOTS + i the position oldest + i."""
    lane = tl.arange(0, LANES)
    is_slot = lane < SLOTS
    is_new = (lane >= SLOTS) & (lane < SLOTS + CHUNK)
    left = oldest + lane - SLOTS
    place = tl.load(slot_position_bm + batch * SLOTS + lane, mask=is_slot, other=0) + tl.where(is_slot, 0, left)
    log_e = tl.load(slot_log_e_bm + batch * SLOTS + lane, mask=is_slot, other=0.0)
    log_e += tl.load(log_e_br + batch * RING + (left + RING) % RING, mask=is_new, other=0.0)
    rank = log_e.to(tl.float32)
    if FORGETS:
        rank = log_e.to(tl.float64) * tau_bits.to(tl.float64, bitcast=True) + place.to(tl.float64)
    rank = tl.where((is_slot | is_new) & (place >= 0), rank, float("-inf"))
    return sort_lanes(rank, lane, lane, LOG_LANES)[1]


@triton.jit
def _rows(slots_ptr, slot_strides, ring_ptr, ring_strides, batch, source, at, head):
    """Pointers to a head's row in the slots and in the ring."""
    old = slots_ptr + batch * slot_strides[0] + source.to(tl.int64) * slot_strides[1] + head * slot_strides[2]
    new = ring_ptr + batch * ring_strides[0] + at.to(tl.int64) * ring_strides[1] + head * ring_strides[2]
    return old, new


@triton.jit
def _select(old_ptr, new_ptr, old, new, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows [m, p] from the slots or from the ring."""
    p = tl.arange(0, BLOCK_P)
    channels = (p < P)[None, :]
    kept = tl.load(old_ptr[:, None] + p[None, :], mask=old[:, None] & channels, other=0.0)
    arrived = tl.load(new_ptr[:, None] + p[None, :], mask=new[:, None] & channels, other=0.0)
    return tl.where(old[:, None], kept, arrived)


@triton.jit
def _hold(slots_ptr, strides, batch, slot, head, rows_mp, held, P: tl.constexpr, BLOCK_P: tl.constexpr):
    p = tl.arange(0, BLOCK_P)
    rows = slots_ptr + batch * strides[0] + slot.to(tl.int64) * strides[1] + head * strides[2]
    tl.store(rows[:, None] + p[None, :], rows_mp, mask=held[:, None] & (p < P)[None, :])

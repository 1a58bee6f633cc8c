"""Device code of the SSD scan: gradients, given the states and their gradients. Names: triton_states.py."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.triton_math import dot
from kernels.ssd_scan.triton_states import decay_between, load_rows, store_rows


@triton.jit
def ssd_head_gradients_kernel(
    dy_ptr,  # [b, t, h, P]
    x_ptr,
    B_ptr,  # [b, t, g, N]
    C_ptr,
    cum_ptr,
    dt_ptr,
    reach_ptr,
    to_end_ptr,
    A_ptr,
    D_ptr,
    begin_ptr,
    states_ptr,  # [b, chunks, h, P, N]: before each chunk
    dstates_ptr,  # the gradient of the state after each chunk
    dx_ptr,  # [b, t, h, P]
    ddt_ptr,  # [b, t, h]
    dA_ptr,  # [b, chunks, h]
    dD_ptr,
    t,
    chunks,
    dy_stride_b,
    x_stride_b,
    B_stride_b,
    C_stride_b,
    dy_stride_t: tl.constexpr,
    x_stride_t: tl.constexpr,
    B_stride_t: tl.constexpr,
    C_stride_t: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx, ddt and the parts of dA and dD of one chunk and some of a group's heads, in turn.

    Tiles are [s, t], written position by reading one, so that the transposed mixing needs no turning for dx.
    """
    splits: tl.constexpr = H // G // HEADS
    chunk, group = tl.program_id(0), tl.program_id(1) // splits
    batch, start = tl.program_id(2).to(tl.int64), (chunk * CHUNK).to(tl.int64)
    num_rows = t - chunk * CHUNK
    dy_ptr += batch * dy_stride_b + start * dy_stride_t
    x_ptr += batch * x_stride_b + start * x_stride_t
    B_ptr += batch * B_stride_b + start * B_stride_t + group * N
    C_ptr += batch * C_stride_b + start * C_stride_t + group * N
    if begin_ptr is not None:
        begin_ptr += (batch * chunks + chunk) * CHUNK

    position = tl.arange(0, CHUNK)
    s, r = position[:, None], position[None, :]
    if N <= BLOCK_N:  # all of B and C: they serve every head
        B = load_rows(B_ptr, B_stride_t, num_rows, 0, CHUNK, N, BLOCK_N)
        C = load_rows(C_ptr, C_stride_t, num_rows, 0, CHUNK, N, BLOCK_N)
    for i in tl.range(HEADS, disable_licm=True):  # else what is hoisted takes registers
        head = tl.program_id(1) * HEADS + i
        in_chunk = ((batch * H + head) * chunks + chunk) * CHUNK
        cum, dt = tl.load(cum_ptr + in_chunk + position), tl.load(dt_ptr + in_chunk + position)
        reach, to_end = tl.load(reach_ptr + in_chunk + position), tl.load(to_end_ptr + in_chunk + position)
        in_state = ((batch * chunks + chunk) * H + head) * P * N
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        from_state = tl.zeros([CHUNK, BLOCK_P], tl.float32)  # y's part before its decay
        to_state = tl.zeros([CHUNK, BLOCK_P], tl.float32)  # d(dt x)'s part before its decay
        overlap = tl.zeros([BLOCK_P], tl.float32)
        for first in range(0, N, BLOCK_N):
            if N > BLOCK_N:
                B = load_rows(B_ptr, B_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
                C = load_rows(C_ptr, C_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
            S = load_rows(states_ptr + in_state, N, P, first, BLOCK_P, N, BLOCK_N)
            dS = load_rows(dstates_ptr + in_state, N, P, first, BLOCK_P, N, BLOCK_N)
            scores = dot(B, tl.trans(C), scores)
            from_state = dot(C, tl.trans(S), from_state)
            to_state = dot(B, tl.trans(dS), to_state)
            overlap += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)

        x = load_rows(x_ptr + head * P, x_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
        dy = load_rows(dy_ptr + head * P, dy_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
        A, D, carry = tl.load(A_ptr + head), tl.load(D_ptr + head), tl.load(reach_ptr + in_chunk + CHUNK - 1)
        dreach = tl.sum(from_state * dy.to(tl.float32), 1) * reach
        dxdt_x = tl.sum(to_state * x.to(tl.float32), 1) * to_end
        dto_end = dxdt_x * dt

        mixing = scores * decay_between(r, s, cum[None, :], cum[:, None], begin_ptr)
        dmixing = dot(x, tl.trans(dy))
        dD = tl.sum(tl.where(s == r, dmixing, 0.0))
        dexponent = dmixing * mixing
        dxdt_x += tl.sum(dexponent, 1)
        dxdt = dot(mixing.to(dy.dtype), dy, to_state * to_end[:, None])

        # da[k] sums the gradients of all exponents whose interval contains k; no term enters only to cancel
        reached = tl.where(s >= r, 1.0, 0.0).to(x.dtype)  # [t, k]: k is in the intervals that end at t
        across = dot((dexponent * dt[:, None]).to(x.dtype), reached)
        da = tl.sum(tl.where(s < r, across + dto_end[:, None], dreach[:, None]), 0)
        da += tl.sum(overlap) * carry

        out = (batch * t + start) * H + head
        tl.store(ddt_ptr + out + position * H, dxdt_x + da * A, mask=position < num_rows)
        partial = (batch * chunks + chunk) * H + head
        tl.store(dA_ptr + partial, tl.sum(da * dt))
        tl.store(dD_ptr + partial, dD)
        dx = dxdt * dt[:, None] + dy.to(tl.float32) * D
        store_rows(dx_ptr + out * P, H * P, num_rows, dx, 0, CHUNK, P, BLOCK_P)


@triton.jit
def ssd_group_gradients_kernel(
    dy_ptr,  # [b, t, h, P]
    x_ptr,
    B_ptr,  # [b, t, g, N]
    C_ptr,
    cum_ptr,
    dt_ptr,
    reach_ptr,
    to_end_ptr,
    begin_ptr,
    states_ptr,  # [b, chunks, h, P, N]: before each chunk
    dstates_ptr,  # the gradient of the state after each chunk
    dB_ptr,  # [splits, b, t, g, N]
    dC_ptr,
    t,
    chunks,
    dy_stride_b,
    x_stride_b,
    B_stride_b,
    C_stride_b,
    dy_stride_t: tl.constexpr,
    x_stride_t: tl.constexpr,
    B_stride_t: tl.constexpr,
    C_stride_t: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some columns of dB and dC of one chunk: some of a group's heads, in turn, add up in registers."""
    blocks: tl.constexpr = tl.cdiv(N, BLOCK_N)
    chunk, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    splits: tl.constexpr = H // G // HEADS
    group, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    batch, start = tl.program_id(2).to(tl.int64), (chunk * CHUNK).to(tl.int64)
    num_rows = t - chunk * CHUNK
    dy_ptr += batch * dy_stride_b + start * dy_stride_t
    x_ptr += batch * x_stride_b + start * x_stride_t
    B_ptr += batch * B_stride_b + start * B_stride_t + group * N
    C_ptr += batch * C_stride_b + start * C_stride_t + group * N
    if begin_ptr is not None:
        begin_ptr += (batch * chunks + chunk) * CHUNK

    position = tl.arange(0, CHUNK)
    s, r = position[:, None], position[None, :]
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)  # [s, t]
    dB = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dC = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    for i in tl.range(HEADS, disable_licm=True):
        head = tl.program_id(1) * HEADS + i
        x = load_rows(x_ptr + head * P, x_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
        dy = load_rows(dy_ptr + head * P, dy_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
        state = ((batch * chunks + chunk) * H + head) * P * N
        S = load_rows(states_ptr + state, N, P, first, BLOCK_P, N, BLOCK_N)
        dS = load_rows(dstates_ptr + state, N, P, first, BLOCK_P, N, BLOCK_N)
        in_chunk = ((batch * H + head) * chunks + chunk) * CHUNK + position
        cum, dt = tl.load(cum_ptr + in_chunk), tl.load(dt_ptr + in_chunk)
        dC = dot((dy.to(tl.float32) * tl.load(reach_ptr + in_chunk)[:, None]).to(S.dtype), S, dC)
        weight = dt * tl.load(to_end_ptr + in_chunk)
        dB = dot((x.to(tl.float32) * weight[:, None]).to(dS.dtype), dS, dB)
        decay = decay_between(r, s, cum[None, :], cum[:, None], begin_ptr)
        dscores += dot(x, tl.trans(dy)) * decay * dt[:, None]

    B = load_rows(B_ptr, B_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
    C = load_rows(C_ptr, C_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
    dB = dot(dscores.to(C.dtype), C, dB)
    dC = dot(tl.trans(dscores.to(B.dtype)), B, dC)
    out = (((split * tl.num_programs(2) + batch) * t + start) * G + group) * N
    store_rows(dB_ptr + out, G * N, num_rows, dB, first, CHUNK, N, BLOCK_N)
    store_rows(dC_ptr + out, G * N, num_rows, dC, first, CHUNK, N, BLOCK_N)

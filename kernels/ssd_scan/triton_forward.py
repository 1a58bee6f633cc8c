"""Device code of the SSD scan: y. Names: triton_states.py."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.triton_math import dot
from kernels.ssd_scan.triton_states import decay_between, load_rows, store_rows


@triton.jit
def ssd_output_kernel(
    x_ptr,  # [b, t, h, P]
    B_ptr,  # [b, t, g, N]
    C_ptr,
    cum_ptr,
    dt_ptr,
    reach_ptr,
    D_ptr,
    begin_ptr,
    states_ptr,  # [b, chunks, h, P, N]: before each chunk
    y_ptr,  # [b, t, h, P]
    t,
    chunks,
    x_stride_b,
    B_stride_b,
    C_stride_b,
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
    """y = ((C B^T) * decay) (dt x) + reach * (C S^T) + D x, for one chunk and some of a group's heads, in turn."""
    splits: tl.constexpr = H // G // HEADS
    chunk, group = tl.program_id(0), tl.program_id(1) // splits
    batch, start = tl.program_id(2).to(tl.int64), (chunk * CHUNK).to(tl.int64)
    num_rows = t - chunk * CHUNK
    x_ptr += batch * x_stride_b + start * x_stride_t
    B_ptr += batch * B_stride_b + start * B_stride_t + group * N
    C_ptr += batch * C_stride_b + start * C_stride_t + group * N
    y_ptr += (batch * t + start) * H * P
    if begin_ptr is not None:
        begin_ptr += (batch * chunks + chunk) * CHUNK

    position = tl.arange(0, CHUNK)
    C = load_rows(C_ptr, C_stride_t, num_rows, 0, CHUNK, N, BLOCK_N)
    B = load_rows(B_ptr, B_stride_t, num_rows, 0, CHUNK, N, BLOCK_N)
    scores = dot(C, tl.trans(B))
    for first in range(BLOCK_N, N, BLOCK_N):
        C = load_rows(C_ptr, C_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
        B = load_rows(B_ptr, B_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
        scores = dot(C, tl.trans(B), scores)

    for i in tl.range(HEADS, disable_licm=True):  # hoisted, addresses would take registers
        head = tl.program_id(1) * HEADS + i
        x = load_rows(x_ptr + head * P, x_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
        in_state = ((batch * chunks + chunk) * H + head) * P * N
        y = tl.zeros([CHUNK, BLOCK_P], tl.float32)
        for first in range(0, N, BLOCK_N):
            if N > BLOCK_N:  # else all of C is there
                C = load_rows(C_ptr, C_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
            S = load_rows(states_ptr + in_state, N, P, first, BLOCK_P, N, BLOCK_N)
            y = dot(C, tl.trans(S), y)

        in_chunk = ((batch * H + head) * chunks + chunk) * CHUNK + position
        cum, dt = tl.load(cum_ptr + in_chunk), tl.load(dt_ptr + in_chunk)
        decay = decay_between(position[:, None], position[None, :], cum[:, None], cum[None, :], begin_ptr)
        mixing = scores * decay * dt[None, :]
        y *= tl.load(reach_ptr + in_chunk)[:, None]
        y = dot(mixing.to(x.dtype), x, y) + tl.load(D_ptr + head) * x.to(tl.float32)
        store_rows(y_ptr + head * P, H * P, num_rows, y, 0, CHUNK, P, BLOCK_P)

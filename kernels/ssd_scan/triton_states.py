"""Device code of the SSD scan: tiles, decays inside chunks, and states before chunks. README.md has the maths.

A chunk of CHUNK positions is one tile. Names as in torch_path.py: cum is the sum of dt A from where the chunk or the
document begins; decay[t, s] = exp(cum[t] - cum[s]), reach[t] = exp(cum[t]) and to_end[s] = exp(cum[last] - cum[s])
are 0 between documents. cum, dt, reach and to_end are laid out [b, h, t], padded to whole chunks with dt = 0, so that
only x, B, C and dy need masks. begin [b, t]: where in its chunk a position's document begins, -1: before the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.triton_math import dot


@triton.jit
def decay_between(later, earlier, cum_later, cum_earlier, begin_ptr):
    """decay[later, earlier] of positions in a chunk; broadcasts."""
    kept = earlier <= later
    if begin_ptr is not None:
        kept = kept & (earlier >= tl.load(begin_ptr + later))
    return tl.exp(tl.where(kept, cum_later - cum_earlier, float("-inf")))


@triton.jit
def load_rows(pointer, stride, num_rows, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first to first + BLOCK of ROWS rows; zeros beyond num_rows and WIDTH."""
    row, column = tl.arange(0, ROWS)[:, None], first + tl.arange(0, BLOCK)[None, :]
    mask = row < num_rows
    if WIDTH % BLOCK != 0:
        mask = mask & (column < WIDTH)
    return tl.load(pointer + row * stride + column, mask=mask, other=0.0)


@triton.jit
def load_columns(pointer, stride, num_rows, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """load_rows, transposed. Triton copies ahead what a product takes as it is loaded, and not what it transposes."""
    row, column = tl.arange(0, ROWS)[None, :], first + tl.arange(0, BLOCK)[:, None]
    mask = row < num_rows
    if WIDTH % BLOCK != 0:
        mask = mask & (column < WIDTH)
    return tl.load(pointer + row * stride + column, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, stride, num_rows, value, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of load_rows, in the memory's dtype."""
    row, column = tl.arange(0, ROWS)[:, None], first + tl.arange(0, BLOCK)[None, :]
    mask = row < num_rows
    if WIDTH % BLOCK != 0:
        mask = mask & (column < WIDTH)
    tl.store(pointer + row * stride + column, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def ssd_decays_kernel(
    dt_ptr,  # [b, t, h]
    A_ptr,
    doc_ids_ptr,
    cum_ptr,
    dt_bht_ptr,
    reach_ptr,
    to_end_ptr,
    begin_ptr,
    t,
    padded_t,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Every sum over one head and chunk that the other kernels read.

    Every position sums its own interval, terms outside it replaced by zeros: no number of another document enters, and
    all sums round through one tree, so cum never grows with t if dt A <= 0.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    batch, start = tl.program_id(1).to(tl.int64), chunk * CHUNK
    position = tl.arange(0, CHUNK)
    dt = tl.load(dt_ptr + (batch * t + start + position) * H + head, mask=start + position < t, other=0.0)
    a = dt * tl.load(A_ptr + head)
    begin = tl.full([CHUNK], -1, tl.int32)
    if doc_ids_ptr is not None:
        doc_ids_ptr += batch * t
        here = tl.minimum(start + position, t - 1)  # the last stands for the positions beyond it
        is_start = tl.load(doc_ids_ptr + here) != tl.load(doc_ids_ptr + tl.maximum(here - 1, 0))
        begin = tl.associative_scan(tl.where(is_start & (start + position < t), position, -1), 0, _larger)
        tl.store(begin_ptr + batch * padded_t + start + position, begin, mask=head == 0)
    s, r = position[:, None], position[None, :]  # sums run down the columns, which a thread has whole: no exchanges
    cum = tl.sum(tl.where((s <= r) & (s >= begin[None, :]), a[:, None], 0.0), 0)
    is_last = position == CHUNK - 1
    cum_last, last_begin = tl.sum(tl.where(is_last, cum, 0.0)), tl.sum(tl.where(is_last, begin, 0))
    offset = (batch * H + head) * padded_t + start + position
    tl.store(cum_ptr + offset, cum)
    tl.store(dt_bht_ptr + offset, dt)
    tl.store(reach_ptr + offset, tl.exp(tl.where(begin < 0, cum, float("-inf"))))
    tl.store(to_end_ptr + offset, tl.exp(tl.where(position >= last_begin, cum_last - cum, float("-inf"))))


@triton.jit
def ssd_states_kernel(
    values_ptr,  # [b, t, h, P]: x, or dy
    maps_ptr,  # [b, t, g, N]: B, or C
    weight_ptr,  # to_end, or reach
    dt_ptr,  # or None
    reach_ptr,
    starts_ptr,  # [b, segments, h, P, N]: what each walk begins with, None for zeros
    states_ptr,  # [b, chunks, h, P, N]: what it holds when it comes to each chunk, None if only ends are wanted
    ends_ptr,  # [b, segments, h, P, N], None if not wanted
    carries_ptr,  # [b, segments, h]: the factor of a walk's start in its end, None if not wanted
    t,
    chunks,
    chunks_per_segment,
    values_stride_b,
    maps_stride_b,
    values_stride_t: tl.constexpr,
    maps_stride_t: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Walk over a segment's chunks with one head's state: forwards with the state itself, in reverse with its gradient.

    Forwards:  S <- reach[last] S + (dt to_end x)^T B          In reverse:  dS <- reach[last] dS + (reach dy)^T C
    """
    blocks_n: tl.constexpr = tl.cdiv(N, BLOCK_N)
    blocks: tl.constexpr = tl.cdiv(P, BLOCK_P) * blocks_n
    segment, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_p, first_n = block // blocks_n * BLOCK_P, block % blocks_n * BLOCK_N
    values_ptr += batch * values_stride_b + head * P
    maps_ptr += batch * maps_stride_b + head // (H // G) * N
    in_head = (batch * H + head) * chunks * CHUNK
    in_segment = (batch * tl.cdiv(chunks, chunks_per_segment) + segment) * H + head

    row, column = first_p + tl.arange(0, BLOCK_P)[:, None], first_n + tl.arange(0, BLOCK_N)[None, :]
    in_state = (row < P) & (column < N)
    offset = row * N + column
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if starts_ptr is not None:
        state += tl.load(starts_ptr + in_segment * P * N + offset, mask=in_state, other=0.0)
    carries = 1.0
    first, last = segment * chunks_per_segment, tl.minimum((segment + 1) * chunks_per_segment, chunks) - 1
    carry = tl.load(reach_ptr + in_head + ((last if REVERSE else first) + 1) * CHUNK - 1)
    for i in range(first, last + 1):
        chunk = first + last - i if REVERSE else i
        following = tl.maximum(chunk - 1, first) if REVERSE else tl.minimum(chunk + 1, last)
        next_carry = tl.load(reach_ptr + in_head + (following + 1) * CHUNK - 1)  # ahead: nothing waits for it
        if states_ptr is not None:
            state_ptr = states_ptr + ((batch * chunks + chunk) * H + head) * P * N
            tl.store(state_ptr + offset, state.to(states_ptr.dtype.element_ty), mask=in_state)

        position = in_head + chunk * CHUNK + tl.arange(0, CHUNK)
        weight = tl.load(weight_ptr + position)
        if dt_ptr is not None:
            weight *= tl.load(dt_ptr + position)
        start, num_rows = (chunk * CHUNK).to(tl.int64), t - chunk * CHUNK
        values = load_columns(
            values_ptr + start * values_stride_t, values_stride_t, num_rows, first_p, CHUNK, P, BLOCK_P
        )
        maps = load_rows(maps_ptr + start * maps_stride_t, maps_stride_t, num_rows, first_n, CHUNK, N, BLOCK_N)
        weighted = (values.to(tl.float32) * weight[None, :]).to(maps.dtype)
        state = dot(weighted, maps, state * carry)
        carries *= carry
        carry = next_carry
    if ends_ptr is not None:
        tl.store(ends_ptr + in_segment * P * N + offset, state, mask=in_state)
    if carries_ptr is not None:
        tl.store(carries_ptr + in_segment, carries, mask=block == 0)


@triton.jit
def ssd_segments_kernel(
    ends_ptr,  # [b, segments, h, STATE]: what walks from zeros end with
    carries_ptr,  # [b, segments, h]
    start_ptr,  # [b, h, STATE]: what the first segment begins with, None for zeros
    starts_ptr,  # [b, segments, h, STATE]
    end_ptr,  # [b, h, STATE]: of the last segment
    segments,
    H: tl.constexpr,
    STATE: tl.constexpr,  # P N
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What each segment begins with, for some elements of one head's state: S <- carry S + end, over the segments."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_state = offset < STATE
    in_head = (batch * H + head) * STATE + offset
    state = tl.zeros([BLOCK], tl.float32)
    if start_ptr is not None:
        state += tl.load(start_ptr + in_head, mask=in_state, other=0.0)
    for i in tl.range(0, segments, num_stages=4):  # the sum waits for memory: the next ones are on their way
        in_segment = (batch * segments + (segments - 1 - i if REVERSE else i)) * H + head
        end = tl.load(ends_ptr + in_segment * STATE + offset, mask=in_state, other=0.0)
        tl.store(starts_ptr + in_segment * STATE + offset, state, mask=in_state)
        state = state * tl.load(carries_ptr + in_segment) + end
    tl.store(end_ptr + in_head, state, mask=in_state)

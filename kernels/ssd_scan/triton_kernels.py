"""Device code of the SSD scan. triton_plan.py plans its launches; README.md has the maths and the tiling.

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
def store_rows(pointer, stride, num_rows, value, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of load_rows, in the memory's dtype."""
    row, column = tl.arange(0, ROWS)[:, None], first + tl.arange(0, BLOCK)[None, :]
    mask = row < num_rows
    if WIDTH % BLOCK != 0:
        mask = mask & (column < WIDTH)
    tl.store(pointer + row * stride + column, value.to(pointer.dtype.element_ty), mask=mask)


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
    h,
    padded_t,
    CHUNK: tl.constexpr,
):
    """Every sum over one head and chunk that the other kernels read.

    Every position sums its own interval, terms outside it replaced by zeros: no number of another document enters, and
    all sums round through one tree, so cum never grows with t if dt A <= 0.
    """
    chunk, head = tl.program_id(0) // h, tl.program_id(0) % h
    batch, start = tl.program_id(1).to(tl.int64), chunk * CHUNK
    position = tl.arange(0, CHUNK)
    dt = tl.load(dt_ptr + (batch * t + start + position) * h + head, mask=start + position < t, other=0.0)
    a = dt * tl.load(A_ptr + head)
    r, s = position[:, None], position[None, :]
    begin = tl.full([CHUNK], -1, tl.int32)
    if doc_ids_ptr is not None:
        doc_ids_ptr += batch * t
        last = t - 1 - start  # stands for the positions beyond it
        doc_r = tl.load(doc_ids_ptr + start + tl.minimum(r, last))
        same = doc_r == tl.load(doc_ids_ptr + start + tl.minimum(s, last))
        from_before = doc_r == tl.load(doc_ids_ptr + tl.maximum(start - 1, 0))
        begin = tl.min(tl.where(from_before, -1, tl.where(same, s, CHUNK)), 1)
        tl.store(begin_ptr + batch * padded_t + start + position, begin, mask=head == 0)
    cum = tl.sum(tl.where((s <= r) & (s >= begin[:, None]), a[None, :], 0.0), 1)
    is_last = position == CHUNK - 1
    cum_last, last_begin = tl.sum(tl.where(is_last, cum, 0.0)), tl.sum(tl.where(is_last, begin, 0))
    offset = (batch * h + head) * padded_t + start + position
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
    start_ptr,  # [b, h, P, N]: what the walk begins with, None for zeros
    states_ptr,  # [b, chunks, h, P, N]: what it holds when it comes to each chunk
    end_ptr,  # [b, h, P, N]
    t,
    h,
    heads_per_group,
    chunks,
    values_stride_b,
    values_stride_t,
    maps_stride_b,
    maps_stride_t,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Walk over the chunks with one head's state: forwards with the state itself, in reverse with its gradient.

    Forwards:  S <- reach[last] S + (dt to_end x)^T B          In reverse:  dS <- reach[last] dS + (reach dy)^T C
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_p = tl.program_id(0) // tl.cdiv(N, BLOCK_N) * BLOCK_P
    first_n = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N
    values_ptr += batch * values_stride_b + head * P
    maps_ptr += batch * maps_stride_b + head // heads_per_group * N
    in_head = (batch * h + head) * chunks * CHUNK

    row, column = first_p + tl.arange(0, BLOCK_P)[:, None], first_n + tl.arange(0, BLOCK_N)[None, :]
    in_state = (row < P) & (column < N)
    offset = row * N + column
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if start_ptr is not None:
        state += tl.load(start_ptr + (batch * h + head) * P * N + offset, mask=in_state, other=0.0)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        state_ptr = states_ptr + ((batch * chunks + chunk) * h + head) * P * N
        tl.store(state_ptr + offset, state.to(states_ptr.dtype.element_ty), mask=in_state)

        in_chunk = in_head + chunk * CHUNK
        position = tl.arange(0, CHUNK)
        weight = tl.load(weight_ptr + in_chunk + position)
        if dt_ptr is not None:
            weight *= tl.load(dt_ptr + in_chunk + position)
        carry = tl.load(reach_ptr + in_chunk + CHUNK - 1)
        start, num_rows = (chunk * CHUNK).to(tl.int64), t - chunk * CHUNK
        values = load_rows(values_ptr + start * values_stride_t, values_stride_t, num_rows, first_p, CHUNK, P, BLOCK_P)
        maps = load_rows(maps_ptr + start * maps_stride_t, maps_stride_t, num_rows, first_n, CHUNK, N, BLOCK_N)
        weighted = (values.to(tl.float32) * weight[:, None]).to(maps.dtype)
        state = dot(tl.trans(weighted), maps, state * carry)
    tl.store(end_ptr + (batch * h + head) * P * N + offset, state, mask=in_state)


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
    h,
    heads_per_group,
    chunks,
    x_stride_b,
    x_stride_t,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = ((C B^T) * decay) (dt x) + reach * (C S^T) + D x, for one head and chunk."""
    chunk, head = tl.program_id(0) // h, tl.program_id(0) % h
    batch, start = tl.program_id(1).to(tl.int64), (chunk * CHUNK).to(tl.int64)
    num_rows = t - chunk * CHUNK
    x_ptr += batch * x_stride_b + start * x_stride_t + head * P
    B_ptr += batch * B_stride_b + start * B_stride_t + head // heads_per_group * N
    C_ptr += batch * C_stride_b + start * C_stride_t + head // heads_per_group * N
    states_ptr += ((batch * chunks + chunk) * h + head) * P * N
    in_chunk = ((batch * h + head) * chunks + chunk) * CHUNK
    if begin_ptr is not None:
        begin_ptr += (batch * chunks + chunk) * CHUNK

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    y = tl.zeros([CHUNK, BLOCK_P], tl.float32)
    for first in range(0, N, BLOCK_N):
        C = load_rows(C_ptr, C_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
        B = load_rows(B_ptr, B_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
        S = load_rows(states_ptr, N, P, first, BLOCK_P, N, BLOCK_N)
        scores = dot(C, tl.trans(B), scores)
        y = dot(C, tl.trans(S), y)

    position = tl.arange(0, CHUNK)
    cum, dt = tl.load(cum_ptr + in_chunk + position), tl.load(dt_ptr + in_chunk + position)
    decay = decay_between(position[:, None], position[None, :], cum[:, None], cum[None, :], begin_ptr)
    mixing = scores * decay * dt[None, :]
    y *= tl.load(reach_ptr + in_chunk + position)[:, None]
    x = load_rows(x_ptr, x_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
    y = dot(mixing.to(x.dtype), x, y) + tl.load(D_ptr + head) * x.to(tl.float32)
    store_rows(y_ptr + ((batch * t + start) * h + head) * P, h * P, num_rows, y, 0, CHUNK, P, BLOCK_P)


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
    h,
    heads_per_group,
    chunks,
    dy_stride_b,
    dy_stride_t,
    x_stride_b,
    x_stride_t,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx, ddt and the parts of dA and dD of one head and chunk.

    Tiles are [s, t], written position by reading one, so that the transposed mixing needs no turning for dx.
    """
    chunk, head = tl.program_id(0) // h, tl.program_id(0) % h
    batch, start = tl.program_id(1).to(tl.int64), (chunk * CHUNK).to(tl.int64)
    num_rows = t - chunk * CHUNK
    dy_ptr += batch * dy_stride_b + start * dy_stride_t + head * P
    x_ptr += batch * x_stride_b + start * x_stride_t + head * P
    B_ptr += batch * B_stride_b + start * B_stride_t + head // heads_per_group * N
    C_ptr += batch * C_stride_b + start * C_stride_t + head // heads_per_group * N
    states_ptr += ((batch * chunks + chunk) * h + head) * P * N
    dstates_ptr += ((batch * chunks + chunk) * h + head) * P * N
    in_chunk = ((batch * h + head) * chunks + chunk) * CHUNK
    if begin_ptr is not None:
        begin_ptr += (batch * chunks + chunk) * CHUNK

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    from_state = tl.zeros([CHUNK, BLOCK_P], tl.float32)  # y's part before its decay
    to_state = tl.zeros([CHUNK, BLOCK_P], tl.float32)  # d(dt x)'s part before its decay
    overlap = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, N, BLOCK_N):
        B = load_rows(B_ptr, B_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
        C = load_rows(C_ptr, C_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
        S = load_rows(states_ptr, N, P, first, BLOCK_P, N, BLOCK_N)
        dS = load_rows(dstates_ptr, N, P, first, BLOCK_P, N, BLOCK_N)
        scores = dot(B, tl.trans(C), scores)
        from_state = dot(C, tl.trans(S), from_state)
        to_state = dot(B, tl.trans(dS), to_state)
        overlap += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)

    position = tl.arange(0, CHUNK)
    cum, dt = tl.load(cum_ptr + in_chunk + position), tl.load(dt_ptr + in_chunk + position)
    reach, to_end = tl.load(reach_ptr + in_chunk + position), tl.load(to_end_ptr + in_chunk + position)
    x = load_rows(x_ptr, x_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
    dy = load_rows(dy_ptr, dy_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
    dreach = tl.sum(from_state * dy.to(tl.float32), 1) * reach
    dxdt_x = tl.sum(to_state * x.to(tl.float32), 1) * to_end
    dto_end = dxdt_x * dt

    s, r = position[:, None], position[None, :]
    mixing = scores * decay_between(r, s, cum[None, :], cum[:, None], begin_ptr)
    dmixing = dot(x, tl.trans(dy))
    dD = tl.sum(tl.where(s == r, dmixing, 0.0))
    dexponent = dmixing * mixing
    dxdt_x += tl.sum(dexponent, 1)

    # da[k] sums the gradients of all exponents whose interval contains k; no term enters only to cancel
    reached = tl.where(s >= r, 1.0, 0.0).to(x.dtype)  # [t, k]: k is in the intervals that end at t
    across = dot((dexponent * dt[:, None]).to(x.dtype), reached)
    da = tl.sum(tl.where(s < r, across + dto_end[:, None], dreach[:, None]), 0)
    da += tl.sum(overlap) * tl.load(reach_ptr + in_chunk + CHUNK - 1)

    out = (batch * t + start) * h + head
    tl.store(ddt_ptr + out + position * h, dxdt_x + da * tl.load(A_ptr + head), mask=position < num_rows)
    partial = (batch * chunks + chunk) * h + head
    tl.store(dA_ptr + partial, tl.sum(da * dt))
    tl.store(dD_ptr + partial, dD)
    dxdt = dot(mixing.to(dy.dtype), dy, to_state * to_end[:, None])
    dx = dxdt * dt[:, None] + dy.to(tl.float32) * tl.load(D_ptr + head)
    store_rows(dx_ptr + out * P, h * P, num_rows, dx, 0, CHUNK, P, BLOCK_P)


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
    num_batch,
    t,
    h,
    g,
    splits,
    chunks,
    dy_stride_b,
    dy_stride_t,
    x_stride_b,
    x_stride_t,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some columns of dB and dC of one chunk: some of a group's heads, in turn, add up in registers."""
    blocks: tl.constexpr = tl.cdiv(N, BLOCK_N)
    chunk, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
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
    heads = h // g // splits
    for head in range((group * splits + split) * heads, (group * splits + split + 1) * heads):
        x = load_rows(x_ptr + head * P, x_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
        dy = load_rows(dy_ptr + head * P, dy_stride_t, num_rows, 0, CHUNK, P, BLOCK_P)
        state = ((batch * chunks + chunk) * h + head) * P * N
        S = load_rows(states_ptr + state, N, P, first, BLOCK_P, N, BLOCK_N)
        dS = load_rows(dstates_ptr + state, N, P, first, BLOCK_P, N, BLOCK_N)
        in_chunk = ((batch * h + head) * chunks + chunk) * CHUNK + position
        cum, dt = tl.load(cum_ptr + in_chunk), tl.load(dt_ptr + in_chunk)
        decay = decay_between(r, s, cum[None, :], cum[:, None], begin_ptr)
        dscores += dot(x, tl.trans(dy)) * decay * dt[:, None]
        dC = dot((dy.to(tl.float32) * tl.load(reach_ptr + in_chunk)[:, None]).to(S.dtype), S, dC)
        weight = dt * tl.load(to_end_ptr + in_chunk)
        dB = dot((x.to(tl.float32) * weight[:, None]).to(dS.dtype), dS, dB)

    B = load_rows(B_ptr, B_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
    C = load_rows(C_ptr, C_stride_t, num_rows, first, CHUNK, N, BLOCK_N)
    dB = dot(dscores.to(C.dtype), C, dB)
    dC = dot(tl.trans(dscores.to(B.dtype)), B, dC)
    out = (((split * num_batch + batch) * t + start) * g + group) * N
    store_rows(dB_ptr + out, g * N, num_rows, dB, first, CHUNK, N, BLOCK_N)
    store_rows(dC_ptr + out, g * N, num_rows, dC, first, CHUNK, N, BLOCK_N)

"""Device code of the causal convolution: a program walks down the rows of some channels, each input read once.

The rows a tap still needs stay in registers. Rows are loaded several at a time, ahead of the stores, since the compiler
cannot know that a store does not change what the next load reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def conv_forward_kernel(
    x_btd,
    weight_dk,
    initial_bkd,
    doc_ids_bt,
    y_btd,
    num_rows,
    num_channels,
    x_stride_b,
    x_stride_t,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch, first, channel = _place(num_rows, SEGMENT, BLOCK_D)
    inside = channel < num_channels
    x_td = x_btd + batch * x_stride_b + channel
    y_td = y_btd + batch * num_rows * num_channels + channel
    weight = _taps(weight_dk, channel, inside, WIDTH)
    past, past_docs = _history(
        x_td, initial_bkd, doc_ids_bt, batch, first, num_rows, num_channels, x_stride_t, channel, inside, WIDTH
    )
    for group in tl.range(0, SEGMENT, ROWS):
        rows = ()
        docs = ()
        for i in tl.static_range(ROWS):
            row = first + group + i
            rows = rows + (tl.load(x_td + row * x_stride_t, mask=inside & (row < num_rows), other=0.0),)
            docs = docs + (_document(doc_ids_bt, batch, row, num_rows),)
        for i in tl.static_range(ROWS):
            row = first + group + i
            taps = _visible(rows[i].to(tl.float32), docs[i], past, past_docs, WIDTH)
            pre = _weighted(taps, weight, WIDTH)
            y = pre * tl.sigmoid(pre)
            tl.store(y_td + row * num_channels, y.to(y_btd.dtype.element_ty), mask=inside & (row < num_rows))
            past = (taps[0],) + past[: WIDTH - 2]
            past_docs = (docs[i],) + past_docs[: WIDTH - 2]


@triton.jit
def conv_backward_kernel(
    x_btd,
    weight_dk,
    initial_bkd,
    doc_ids_bt,
    grad_y_btd,
    grad_x_btd,
    grad_weight_skd,
    num_rows,
    num_channels,
    x_stride_b,
    x_stride_t,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of row s is complete WIDTH - 1 rows later, so each segment reads that many rows of the next one.

    grad_weight_skd: room for every segment's share of the weight's gradient.
    """
    batch, first, channel = _place(num_rows, SEGMENT, BLOCK_D)
    inside = channel < num_channels
    end = tl.minimum(first + SEGMENT, num_rows)
    x_td = x_btd + batch * x_stride_b + channel
    grad_y_td = grad_y_btd + batch * num_rows * num_channels + channel
    grad_x_td = grad_x_btd + batch * num_rows * num_channels + channel
    weight = _taps(weight_dk, channel, inside, WIDTH)
    past, past_docs = _history(
        x_td, initial_bkd, doc_ids_bt, batch, first, num_rows, num_channels, x_stride_t, channel, inside, WIDTH
    )
    grad_weight = ()
    pending = ()  # gradients of the last rows, still without what later rows add
    for lag in tl.static_range(WIDTH):
        grad_weight = grad_weight + (tl.zeros((BLOCK_D,), tl.float32),)
        if lag > 0:
            pending = pending + (tl.zeros((BLOCK_D,), tl.float32),)
    for group in tl.range(0, SEGMENT + WIDTH - 1, ROWS):
        rows = ()
        grads = ()
        docs = ()
        for i in tl.static_range(ROWS):
            row = first + group + i
            rows = rows + (tl.load(x_td + row * x_stride_t, mask=inside & (row < num_rows), other=0.0),)
            grads = grads + (tl.load(grad_y_td + row * num_channels, mask=inside & (row < num_rows), other=0.0),)
            docs = docs + (_document(doc_ids_bt, batch, row, num_rows),)
        for i in tl.static_range(ROWS):
            row = first + group + i
            taps = _visible(rows[i].to(tl.float32), docs[i], past, past_docs, WIDTH)
            pre = _weighted(taps, weight, WIDTH)
            gate = tl.sigmoid(pre)
            grad_pre = grads[i].to(tl.float32) * gate * (1 + pre * (1 - gate))
            grad_pre = tl.where(row < num_rows, grad_pre, 0.0)  # taps of rows past the end may be anything
            sums = ()
            complete = (grad_pre * weight[0],)
            for lag in tl.static_range(WIDTH):
                sums = sums + (grad_weight[lag] + tl.where(row < end, grad_pre * taps[lag], 0.0),)
                if lag > 0:
                    same = docs[i] == past_docs[lag - 1]
                    complete = complete + (pending[lag - 1] + tl.where(same, grad_pre * weight[lag], 0.0),)
            grad_weight = sums
            source = row - (WIDTH - 1)
            stored = inside & (source >= first) & (source < end)
            tl.store(
                grad_x_td + source * num_channels, complete[WIDTH - 1].to(grad_x_btd.dtype.element_ty), mask=stored
            )
            pending = complete[: WIDTH - 1]
            past = (taps[0],) + past[: WIDTH - 2]
            past_docs = (docs[i],) + past_docs[: WIDTH - 2]
    share_kd = grad_weight_skd + tl.program_id(0).to(tl.int64) * WIDTH * num_channels + channel
    for lag in tl.static_range(WIDTH):
        tl.store(share_kd + (WIDTH - 1 - lag) * num_channels, grad_weight[lag], mask=inside)


@triton.jit
def conv_step_kernel(
    x_bd, weight_dk, state_bkd, y_bd, num_channels, x_stride_b, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One row per batch element; the state moves up by one row, in place."""
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < num_channels
    state_kd = state_bkd + batch * (WIDTH - 1) * num_channels + channel
    weight = _taps(weight_dk, channel, inside, WIDTH)
    taps = (tl.load(x_bd + batch * x_stride_b + channel, mask=inside, other=0.0).to(tl.float32),)
    for lag in tl.static_range(1, WIDTH):
        row = tl.load(state_kd + (WIDTH - 1 - lag) * num_channels, mask=inside, other=0.0)
        taps = taps + (row.to(tl.float32),)
    pre = _weighted(taps, weight, WIDTH)
    y = pre * tl.sigmoid(pre)
    tl.store(y_bd + batch * num_channels + channel, y.to(y_bd.dtype.element_ty), mask=inside)
    for lag in tl.static_range(WIDTH - 1):
        moved = taps[lag].to(state_bkd.dtype.element_ty)
        tl.store(state_kd + (WIDTH - 2 - lag) * num_channels, moved, mask=inside)


@triton.jit
def _place(num_rows, SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's batch element, first row and channels."""
    segments = tl.cdiv(num_rows, SEGMENT)
    batch = (tl.program_id(0) // segments).to(tl.int64)
    first = (tl.program_id(0) % segments).to(tl.int64) * SEGMENT
    return batch, first, tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def _taps(weight_dk, channel, inside, WIDTH: tl.constexpr):
    """The weights by lag: the first multiplies the current row."""
    weight = ()
    for lag in tl.static_range(WIDTH):
        tap = tl.load(weight_dk + channel * WIDTH + (WIDTH - 1 - lag), mask=inside, other=0.0)
        weight = weight + (tap.to(tl.float32),)
    return weight


@triton.jit
def _history(
    x_td,
    initial_bkd,
    doc_ids_bt,
    batch,
    first,
    num_rows,
    num_channels,
    x_stride_t,
    channel,
    inside,
    WIDTH: tl.constexpr,
):
    """The WIDTH - 1 rows before `first` and their documents, latest first."""
    past = ()
    docs = ()
    for lag in tl.static_range(1, WIDTH):
        row = first - lag
        tap = tl.load(x_td + row * x_stride_t, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        if initial_bkd is not None:
            initial_d = initial_bkd + (batch * (WIDTH - 1) + row + WIDTH - 1) * num_channels + channel
            tap += tl.load(initial_d, mask=inside & (row < 0), other=0.0).to(tl.float32)
        past = past + (tap,)
        docs = docs + (_document(doc_ids_bt, batch, row, num_rows),)
    return past, docs


@triton.jit
def _document(doc_ids_bt, batch, row, num_rows):
    """Document of a row; rows outside the sequence are zero whatever theirs."""
    doc = tl.zeros((), tl.int64)
    if doc_ids_bt is not None:
        doc = tl.load(doc_ids_bt + batch * num_rows + row, mask=(row >= 0) & (row < num_rows), other=0).to(tl.int64)
    return doc


@triton.jit
def _visible(x_d, doc, past, past_docs, WIDTH: tl.constexpr):
    """The rows that the taps meet, latest first, with zeros for other documents."""
    taps = (x_d,)
    for lag in tl.static_range(1, WIDTH):
        taps = taps + (tl.where(doc == past_docs[lag - 1], past[lag - 1], 0.0),)
    return taps


@triton.jit
def _weighted(taps, weight, WIDTH: tl.constexpr):
    total = taps[0] * weight[0]
    for lag in tl.static_range(1, WIDTH):
        total += taps[lag] * weight[lag]
    return total

"""Device code of what works element by element: gates, rotations, and gradients that meet in one tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.pointwise.triton_rows import load_tile, store_tile


@triton.jit
def place(num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile. Grid: tiles, along the width first."""
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    return row, column, (row < num_rows)[:, None] & (column < width)[None, :]


@triton.jit
def table_kernel(
    position_ptr, cos_ptr, sin_ptr, num_rows, width, log2_theta_bits, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Cosines and sines of position * theta^(-i / width). log2_theta_bits: of a float64; a number would be float32."""
    row, column, mask = place(num_rows, width, ROWS, BLOCK)
    position = tl.load(position_ptr + row, mask=row < num_rows, other=0).to(tl.float64)
    exponent = -log2_theta_bits.to(tl.float64, bitcast=True) * (column.to(tl.float64) / width)
    angle = position[:, None] * tl.exp2(exponent)[None, :]
    store_tile(cos_ptr, row, width, column, mask, tl.cos(angle).to(tl.float32))
    store_tile(sin_ptr, row, width, column, mask, tl.sin(angle).to(tl.float32))


@triton.jit
def gated_kernel(
    x_ptr, gate_ptr, out_ptr, num_rows, width, x_stride, gate_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = x * SiLU(gate), rows of out dense."""
    row, column, mask = place(num_rows, width, ROWS, BLOCK)
    gate = load_tile(gate_ptr, row, gate_stride, column, mask)
    x = load_tile(x_ptr, row, x_stride, column, mask)
    store_tile(out_ptr, row, width, column, mask, x * gate * tl.sigmoid(gate))


@triton.jit
def gated_backward_kernel(
    x_ptr, gate_ptr, grad_ptr, grad_x_ptr, grad_gate_ptr, again_ptr,
    num_rows, width, x_stride, gate_stride, grad_stride, grad_x_stride, grad_gate_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """again: where the forward's result is written once more, in dense rows, or None."""
    row, column, mask = place(num_rows, width, ROWS, BLOCK)
    gate = load_tile(gate_ptr, row, gate_stride, column, mask)
    x = load_tile(x_ptr, row, x_stride, column, mask)
    grad = load_tile(grad_ptr, row, grad_stride, column, mask)
    open_share = tl.sigmoid(gate)
    store_tile(grad_x_ptr, row, grad_x_stride, column, mask, grad * gate * open_share)
    grad_gate = grad * x * open_share * (1 + gate * (1 - open_share))
    store_tile(grad_gate_ptr, row, grad_gate_stride, column, mask, grad_gate)
    if again_ptr is not None:
        store_tile(again_ptr, row, width, column, mask, x * gate * open_share)


@triton.jit
def join_kernel(
    first_ptr, second_ptr, third_ptr, out_ptr, num_rows, width, begin_second, begin_third, end,
    first_stride, second_stride, third_stride, out_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of three tensors side by side; zeros for one that is None, and from the third's end up to `width`."""
    row, column, mask = place(num_rows, width, ROWS, BLOCK)
    value = tl.zeros([ROWS, BLOCK], tl.float32)
    if first_ptr is not None:
        value += load_tile(first_ptr, row, first_stride, column, mask & (column < begin_second)[None, :])
    if second_ptr is not None:
        inside = (column >= begin_second) & (column < begin_third)
        value += load_tile(second_ptr, row, second_stride, column - begin_second, mask & inside[None, :])
    if third_ptr is not None:
        inside = (column >= begin_third) & (column < end)
        value += load_tile(third_ptr, row, third_stride, column - begin_third, mask & inside[None, :])
    store_tile(out_ptr, row, out_stride, column, mask, value)


@triton.jit
def add_rows_kernel(
    first_ptr, second_ptr, third_ptr, out_ptr, num_rows, width, t, first_t, second_t, third_t,
    first_strides, second_strides, third_strides, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of three tensors [b, up to t, width], filled up with zeros along t. strides: of batch and time."""
    row, column, mask = place(num_rows, width, ROWS, BLOCK)
    value = tl.zeros([ROWS, BLOCK], tl.float32)
    if first_ptr is not None:
        value += rows_of(first_ptr, row, first_strides, column, mask, t, first_t)
    if second_ptr is not None:
        value += rows_of(second_ptr, row, second_strides, column, mask, t, second_t)
    if third_ptr is not None:
        value += rows_of(third_ptr, row, third_strides, column, mask, t, third_t)
    store_tile(out_ptr, row, width, column, mask, value)


@triton.jit
def rows_of(ptr, row, strides, column, mask, t, num_times):
    """Rows counted over [b, t] of a tensor that has num_times of them in each b."""
    time = row % t
    offset = row // t * strides[0] + time * strides[1]
    inside = mask & (time < num_times)[:, None]
    return tl.load(ptr + offset[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def head_rows(ptr, strides, batch, time, head):
    """Where rows of a tensor [b, t, h, p] begin, as a column."""
    return (ptr + batch * strides[0] + time * strides[1] + head * strides[2])[:, None]


@triton.jit
def load_pair(ptr, mask, HALF: tl.constexpr):
    """The two halves of rows, whose channels are rotated in pairs."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32), tl.load(ptr + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pair(ptr, mask, low, high, HALF: tl.constexpr):
    tl.store(ptr, low.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF, high.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def turned(low, high, cos_ptr, sin_ptr, strides, batch, time, channel, mask, BACK: tl.constexpr):
    """The pairs rotated by a table's angles, or back."""
    offset = (batch * strides[0] + time * strides[1])[:, None] + channel
    cos = tl.load(cos_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def rotate_kernel(
    x_ptr, out_ptr, other_out_ptr, cos_ptr, sin_ptr, other_cos_ptr, other_sin_ptr,
    num_rows, t, h, x_strides, out_strides, table_strides, other_strides,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """x [b, t, h, 2 HALF] rotated by one table (or back), and by another unless that is None. Grid: tiles of rows.

    Both results are laid out alike.  strides: of b, t and h; of a table, of b and t.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, time, head = row // (t * h), row // h % t, row % h
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows)[:, None] & (channel < HALF)
    low, high = load_pair(head_rows(x_ptr, x_strides, batch, time, head) + channel, mask, HALF)
    out = head_rows(out_ptr, out_strides, batch, time, head) + channel
    first, second = turned(low, high, cos_ptr, sin_ptr, table_strides, batch, time, channel, mask, BACK)
    store_pair(out, mask, first, second, HALF)
    if other_out_ptr is not None:
        out = head_rows(other_out_ptr, out_strides, batch, time, head) + channel
        first, second = turned(low, high, other_cos_ptr, other_sin_ptr, other_strides, batch, time, channel, mask, BACK)
        store_pair(out, mask, first, second, HALF)


@triton.jit
def rotate_back_kernel(
    x_ptr, other_ptr, base_ptr, beside_ptr, out_ptr, cos_ptr, sin_ptr, other_cos_ptr, other_sin_ptr,
    num_rows, t, h, x_strides, other_x_strides, base_strides, beside_strides, out_strides, table_strides, other_strides,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """base + x rotated back by one table + another x by another table; each may be None. Otherwise as rotate_kernel.

    beside: copied to the h heads of out that follow, unless it is None.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, time, head = row // (t * h), row // h % t, row % h
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows)[:, None] & (channel < HALF)
    low = tl.zeros([ROWS, BLOCK], tl.float32)
    high = tl.zeros([ROWS, BLOCK], tl.float32)
    if base_ptr is not None:
        low, high = load_pair(head_rows(base_ptr, base_strides, batch, time, head) + channel, mask, HALF)
    if x_ptr is not None:
        first, second = load_pair(head_rows(x_ptr, x_strides, batch, time, head) + channel, mask, HALF)
        first, second = turned(first, second, cos_ptr, sin_ptr, table_strides, batch, time, channel, mask, BACK)
        low += first
        high += second
    if other_ptr is not None:
        first, second = load_pair(head_rows(other_ptr, other_x_strides, batch, time, head) + channel, mask, HALF)
        first, second = turned(
            first, second, other_cos_ptr, other_sin_ptr, other_strides, batch, time, channel, mask, BACK
        )
        low += first
        high += second
    store_pair(head_rows(out_ptr, out_strides, batch, time, head) + channel, mask, low, high, HALF)
    if beside_ptr is not None:
        low, high = load_pair(head_rows(beside_ptr, beside_strides, batch, time, head) + channel, mask, HALF)
        store_pair(head_rows(out_ptr, out_strides, batch, time, head + h) + channel, mask, low, high, HALF)

"""Device code of products with few rows: bound by reading the weights, once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def few_rows_kernel(
    x_ri, first_oi, second_oi, third_oi, first_ro, second_ro, third_ro, num_in, num_first, num_second, num_third,
    x_stride, first_stride, second_stride, third_stride,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows, of one of up to three weights. Strides are those of rows."""
    block = tl.program_id(0)
    num_before = tl.cdiv(num_first, BLOCK_O)
    if second_oi is None or block < num_before:
        products(
            x_ri, first_oi, first_ro, block, num_in, num_first, x_stride, first_stride,
            ROWS, BLOCK_O, BLOCK_I, NUM_BLOCKS,
        )  # fmt: skip
    elif block < num_before + tl.cdiv(num_second, BLOCK_O):
        products(
            x_ri, second_oi, second_ro, block - num_before, num_in, num_second, x_stride, second_stride,
            ROWS, BLOCK_O, BLOCK_I, NUM_BLOCKS,
        )  # fmt: skip
    elif third_oi is not None:
        num_before += tl.cdiv(num_second, BLOCK_O)
        products(
            x_ri, third_oi, third_ro, block - num_before, num_in, num_third, x_stride, third_stride,
            ROWS, BLOCK_O, BLOCK_I, NUM_BLOCKS,
        )  # fmt: skip


@triton.jit
def products(
    x_ri, weight_oi, y_ro, block, num_in, num_out, x_stride, weight_stride,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    totals = zeros(ROWS, BLOCK_O)
    for block_i in tl.static_range(NUM_BLOCKS):
        i = block_i * BLOCK_I + tl.arange(0, BLOCK_I)
        weight = load_weight(weight_oi, o, i, num_out, num_in, weight_stride)
        totals = add_products(totals, x_ri, weight, i, num_in, x_stride, ROWS)
    for row in tl.static_range(ROWS):
        tl.store(y_ro + row * num_out + o, totals[row].to(y_ro.dtype.element_ty), mask=o < num_out)


@triton.jit
def gated_few_rows_kernel(
    x_ri, weight_oi, y_ro, num_in, num_out, x_stride, weight_stride,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """SiLU(gate) * up of some outputs; the weight has the rows of all gates, then those of all ups."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    gates = zeros(ROWS, BLOCK_O)
    ups = zeros(ROWS, BLOCK_O)
    for block_i in tl.static_range(NUM_BLOCKS):
        i = block_i * BLOCK_I + tl.arange(0, BLOCK_I)
        gate_weight = load_weight(weight_oi, o, i, num_out, num_in, weight_stride)
        up_weight = load_weight(weight_oi + num_out * weight_stride, o, i, num_out, num_in, weight_stride)
        gates = add_products(gates, x_ri, gate_weight, i, num_in, x_stride, ROWS)
        ups = add_products(ups, x_ri, up_weight, i, num_in, x_stride, ROWS)
    for row in tl.static_range(ROWS):
        gate = gates[row].to(y_ro.dtype.element_ty).to(tl.float32)  # rounded, as a product of its own would be
        up = ups[row].to(y_ro.dtype.element_ty).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
        tl.store(y_ro + row * num_out + o, y.to(y_ro.dtype.element_ty), mask=o < num_out)


@triton.jit
def zeros(ROWS: tl.constexpr, BLOCK_O: tl.constexpr):
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((BLOCK_O,), tl.float32),)
    return totals


@triton.jit
def load_weight(weight_oi, o, i, num_out, num_in, stride):
    """All at once, before anything waits."""
    at = weight_oi + o[:, None].to(tl.int64) * stride + i[None, :]
    return tl.load(at, mask=(o < num_out)[:, None] & (i < num_in)[None, :], other=0.0).to(tl.float32)


@triton.jit
def add_products(totals, x_ri, weight, i, num_in, x_stride, ROWS: tl.constexpr):
    sums = ()
    for row in tl.static_range(ROWS):
        x = tl.load(x_ri + row * x_stride + i, mask=i < num_in, other=0.0).to(tl.float32)
        sums = sums + (totals[row] + tl.sum(weight * x[None, :], 1),)
    return sums

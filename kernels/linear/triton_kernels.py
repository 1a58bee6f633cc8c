"""Device code of a product with few rows: bound by reading the weight, once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def few_rows_kernel(
    x_ri, weight_oi, y_ro, num_in, num_out, x_stride_r, weight_stride_o,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows. Weights are loaded all at once if they are one block: a single wait for memory."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = o < num_out
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((BLOCK_O,), tl.float32),)
    for block in tl.static_range(NUM_BLOCKS):
        i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        in_i = i < num_in
        at = weight_oi + o[:, None].to(tl.int64) * weight_stride_o + i[None, :]
        weight = tl.load(at, mask=in_o[:, None] & in_i[None, :], other=0.0).to(tl.float32)
        sums = ()
        for row in tl.static_range(ROWS):
            x = tl.load(x_ri + row * x_stride_r + i, mask=in_i, other=0.0).to(tl.float32)
            sums = sums + (totals[row] + tl.sum(weight * x[None, :], 1),)
        totals = sums
    for row in tl.static_range(ROWS):
        tl.store(y_ro + row * num_out + o, totals[row].to(y_ro.dtype.element_ty), mask=in_o)

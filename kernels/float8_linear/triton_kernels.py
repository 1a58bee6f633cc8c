"""Device code of casts to float8: the largest value, then the tensor and its transpose in one pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(x_ptr, tile, num_rows, width, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile in float32, 0 outside of x; with its rows and columns."""
    tiles = tl.cdiv(width, COLUMNS)
    row = (tile // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    return x.to(tl.float32), row, column


@triton.jit
def largest_kernel(
    x_ptr, largest_ptr, num_rows, width, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Write the largest absolute value of each program's tiles. NaN is left out: the cast keeps it."""
    largest = tl.zeros((ROWS, COLUMNS), tl.float32)
    num_tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), num_tiles, PROGRAMS):
        x, _, _ = load_tile(x_ptr, tile, num_rows, width, x_stride, ROWS, COLUMNS)
        largest = tl.maximum(largest, tl.abs(x))
    tl.store(largest_ptr + tl.program_id(0), tl.max(tl.max(largest, 1), 0))


@triton.jit
def cast_kernel(
    x_ptr, largest_ptr, rows_ptr, columns_ptr, inverse_ptr, num_rows, width, filled_rows, filled_width, x_stride,
    LIMIT: tl.constexpr, SMALLEST: tl.constexpr, NUM_LARGEST: tl.constexpr, BLOCK_LARGEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write x in float8, and its transpose unless that is None; both filled up with zeros.

    Tiles go backwards: what `largest_kernel` read last may still be in the cache.
    """
    i = tl.arange(0, BLOCK_LARGEST)
    largest = tl.max(tl.load(largest_ptr + i, mask=i < NUM_LARGEST, other=0.0), 0)
    largest = tl.maximum(largest, SMALLEST)
    scale = tl.div_rn(tl.full((), LIMIT, tl.float32), largest)
    if tl.program_id(0) == 0:
        tl.store(inverse_ptr, tl.div_rn(largest, tl.full((), LIMIT, tl.float32)))
    num_tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(width, COLUMNS)
    for index in range(tl.program_id(0), num_tiles, PROGRAMS):
        tile = num_tiles - 1 - index
        x, row, column = load_tile(x_ptr, tile, num_rows, width, x_stride, ROWS, COLUMNS)
        scaled = tl.minimum(tl.maximum(x * scale, -LIMIT, tl.PropagateNan.ALL), LIMIT, tl.PropagateNan.ALL)
        kept = scaled.to(rows_ptr.dtype.element_ty)
        inside = (row < filled_rows)[:, None] & (column < filled_width)[None, :]
        tl.store(rows_ptr + row.to(tl.int64)[:, None] * filled_width + column[None, :], kept, mask=inside)
        if columns_ptr is not None:
            inside = (column < filled_width)[:, None] & (row < filled_rows)[None, :]
            at = columns_ptr + column.to(tl.int64)[:, None] * filled_rows + row[None, :]
            tl.store(at, tl.trans(kept), mask=inside)

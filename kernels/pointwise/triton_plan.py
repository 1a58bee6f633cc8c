"""The launches of the small operators, planned from shapes alone. Rows are contiguous."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import triton
from torch import Tensor

from kernels.gpu.launch import Launch, num_bytes
from kernels.pointwise import triton_elements as elements
from kernels.pointwise import triton_rows as rows
from kernels.pointwise.reference import Table

TILE = 4096  # numbers that a program of 4 warps holds of each tensor: 32 a thread
PROGRAMS = 528  # of a backward that sums over rows: 4 for each multiprocessor of an H100
LOGITS_BLOCK = 8192


def norm(
    x: Tensor, delta: Tensor | None, gate: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor,
    inverse: Tensor | None, eps: float,
) -> Launch:  # fmt: skip
    """Write out, and total and inverse unless None. Without a total, that of x + delta is not rounded."""
    num_rows, width = _size(x)
    tile = _row_tile(width)
    return Launch(
        rows.norm_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]),),
        {
            **_pointers(x=x, delta=delta, gate=gate, weight=weight, total=total, out=out, inverse=inverse),
            **{"num_rows": num_rows, "width": width, "eps": float(eps)},
            **_strides(x=x, delta=delta, gate=gate),
        },
        tile,
        num_warps=_warps(tile),
        bytes=num_bytes(x, delta, gate, weight, total, out, inverse),
    )


def norm_backward(
    x: Tensor, delta: Tensor | None, gate: Tensor | None, weight: Tensor, inverse: Tensor, grad: Tensor,
    base: Tensor | None, grad_x: Tensor, grad_delta: Tensor | None, grad_gate: Tensor | None,
    again: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Write the gradients, to share_ptr each program's part of the weight's, and what was normed unless None."""
    num_rows, width = _size(x)
    tile = _row_tile(width)
    programs = min(PROGRAMS, triton.cdiv(num_rows, tile["ROWS"]))
    share = inverse.new_empty(programs, width)
    read = {"x": x, "delta": delta, "gate": gate, "weight": weight, "inverse": inverse, "grad": grad, "base": base}
    written = {"grad_x": grad_x, "grad_delta": grad_delta, "grad_gate": grad_gate, "again": again, "share": share}
    return Launch(
        rows.norm_backward_kernel,
        (programs,),
        {
            **_pointers(**read, **written),
            **{"num_rows": num_rows, "width": width},
            **_strides(x=x, delta=delta, gate=gate, grad=grad, base=base),
        },
        tile,
        num_warps=_warps(tile),
        bytes=num_bytes(*read.values(), *written.values()),
    )


def cross_entropy(
    logits: Tensor, target: Tensor, nll: Tensor, log_z: Tensor, z_loss_weight: float, with_gradient: bool
) -> Launch:
    """Write nll and log_z, and over the logits."""
    num_rows, width = logits.shape
    block = min(LOGITS_BLOCK, triton.next_power_of_2(width))
    return Launch(
        rows.cross_entropy_kernel,
        (num_rows,),
        {
            **_pointers(logits=logits, target=target, nll=nll, log_z=log_z),
            **{"width": width, "stride": logits.stride(0), "z_loss_weight": float(z_loss_weight)},
        },
        {"WITH_GRADIENT": with_gradient, "BLOCK": block},
        num_warps=max(1, min(16, block // 256)),
        bytes=num_bytes(logits, target, nll, log_z) + (num_bytes(logits) if with_gradient else 0),
    )


def gated(x: Tensor, gate: Tensor, out: Tensor) -> Launch:
    """Write out."""
    num_rows, width = _size(x)
    grid, tile = _elements(num_rows, width)
    return Launch(
        elements.gated_kernel,
        grid,
        {
            **_pointers(x=x, gate=gate, out=out),
            **{"num_rows": num_rows, "width": width},
            **_strides(x=x, gate=gate),
        },
        tile,
        bytes=num_bytes(x, gate, out),
    )


def gated_backward(
    x: Tensor, gate: Tensor, grad: Tensor, grad_x: Tensor, grad_gate: Tensor, again: Tensor | None = None
) -> Launch:
    """Write both gradients, and the product unless None."""
    num_rows, width = _size(x)
    grid, tile = _elements(num_rows, width)
    tensors = {"x": x, "gate": gate, "grad": grad, "grad_x": grad_x, "grad_gate": grad_gate}
    return Launch(
        elements.gated_backward_kernel,
        grid,
        {
            **_pointers(**tensors, again=again),
            **{"num_rows": num_rows, "width": width},
            **_strides(**tensors),
        },
        tile,
        bytes=num_bytes(*tensors.values(), again),
    )


def join(
    first: Tensor | None, second: Tensor | None, third: Tensor | None, out: Tensor, widths: Sequence[int]
) -> Launch:
    """Write out, all of its rows; widths: of the three parts."""
    num_rows, width = _size(out)
    grid, tile = _elements(num_rows, width)
    parts = {"first": first, "second": second, "third": third}
    return Launch(
        elements.join_kernel,
        grid,
        {
            **_pointers(**parts, out=out),
            **{"num_rows": num_rows, "width": width},
            **{"begin_second": widths[0], "begin_third": sum(widths[:2]), "end": sum(widths)},
            **_strides(**parts, out=out),
        },
        tile,
        bytes=num_bytes(*parts.values(), out),
    )


def add_rows(first: Tensor | None, second: Tensor | None, third: Tensor | None, out: Tensor) -> Launch:
    """Write out [b, t, d]; parts [b, at most t, d]."""
    num_rows, width = _size(out)
    grid, tile = _elements(num_rows, width)
    parts = {"first": first, "second": second, "third": third}
    return Launch(
        elements.add_rows_kernel,
        grid,
        {
            **_pointers(**parts, out=out),
            **{"num_rows": num_rows, "width": width, "t": out.shape[1]},
            **{f"{name}_t": 0 if x is None else x.shape[1] for name, x in parts.items()},
            **{f"{name}_strides": None if x is None else x.stride()[:2] for name, x in parts.items()},
        },
        tile,
        bytes=num_bytes(*parts.values(), out),
    )


def rotary_table(position: Tensor, theta: float, cos: Tensor, sin: Tensor) -> Launch:
    """Write cos and sin; position is contiguous."""
    width = cos.shape[-1]
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    num_rows = position.numel()
    bits = struct.unpack("<q", struct.pack("<d", math.log2(theta)))[0]
    return Launch(
        elements.table_kernel,
        (triton.cdiv(num_rows, rows),),
        {**_pointers(position=position, cos=cos, sin=sin), "num_rows": num_rows, "width": width}
        | {"log2_theta_bits": bits},
        {"ROWS": rows, "BLOCK": block},
        bytes=num_bytes(position, cos, sin),
    )


def rotate(
    x: Tensor, out: Tensor, other_out: Tensor | None, table: Table, other: Table | None, *, back: bool
) -> Launch:
    """Write out, and other_out, laid out alike, unless it is None."""
    (cos, sin), (other_cos, other_sin) = table, other or (None, None)
    grid, sizes, tile = _pairs(x)
    return Launch(
        elements.rotate_kernel,
        grid,
        {
            **_pointers(x=x, out=out, other_out=other_out),
            **_pointers(cos=cos, sin=sin, other_cos=other_cos, other_sin=other_sin),
            **sizes,
            **{"x_strides": _head_strides(x), "out_strides": _head_strides(out)},
            **{"table_strides": _table_strides(cos, x), "other_strides": _table_strides(other_cos, x)},
        },
        {**tile, "BACK": back},
        bytes=num_bytes(x, out, other_out, cos, sin, other_cos, other_sin),
    )


def rotate_back(
    x: Tensor | None, other_x: Tensor | None, base: Tensor | None, out: Tensor, table: Table, other: Table | None,
    beside: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Write out = base + x and other_x, each rotated back by its table; None counts as zeros.

    beside: what is written to as many heads that follow those of out, unless it is None.
    """
    (cos, sin), (other_cos, other_sin) = table, other or (None, None)
    grid, sizes, tile = _pairs(out)
    given = {"x": x, "other_x": other_x, "base": base, "beside": beside, "out": out}
    return Launch(
        elements.rotate_back_kernel,
        grid,
        {
            **_pointers(x=x, other=other_x, base=base, beside=beside, out=out),
            **_pointers(cos=cos, sin=sin, other_cos=other_cos, other_sin=other_sin),
            **sizes,
            **{f"{name}_strides": None if tensor is None else _head_strides(tensor) for name, tensor in given.items()},
            **{"table_strides": _table_strides(cos, out), "other_strides": _table_strides(other_cos, out)},
        },
        {**tile, "BACK": True},
        bytes=num_bytes(*given.values(), cos, sin, other_cos, other_sin),
    )


def _size(x: Tensor) -> tuple[int, int]:
    """Rows of all leading dimensions, and their width."""
    return math.prod(x.shape[:-1]), x.shape[-1]


def _row_tile(width: int) -> dict[str, int]:
    """Whole rows, as many as a program holds."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, min(64, TILE // block)), "BLOCK": block}


def _warps(tile: dict[str, int]) -> int:
    return max(4, min(16, tile["ROWS"] * tile["BLOCK"] // 1024))


def _elements(num_rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of an operator whose tiles need not hold whole rows."""
    block = min(128, triton.next_power_of_2(width))
    tile = {"ROWS": 2048 // block if num_rows > 64 else 8, "BLOCK": block}
    return (triton.cdiv(width, block) * triton.cdiv(num_rows, tile["ROWS"]),), tile


def _pairs(x: Tensor) -> tuple[tuple[int], dict[str, int], dict[str, int]]:
    """Grid, sizes and tile of a rotation of x [(b,) t, h, p]."""
    num_rows, half = math.prod(x.shape[:-1]), x.shape[-1] // 2
    block = triton.next_power_of_2(half)
    tile = {"HALF": half, "BLOCK": block, "ROWS": max(1, 2048 // block)}
    return (triton.cdiv(num_rows, tile["ROWS"]),), {"num_rows": num_rows, "t": x.shape[-3], "h": x.shape[-2]}, tile


def _head_strides(x: Tensor) -> tuple[int, int, int]:
    """Of b, t and h; there may be no b."""
    *batch, t, h, _ = x.stride()
    return (batch[0] if batch else 0), t, h


def _table_strides(table: Tensor | None, x: Tensor) -> tuple[int, int] | None:
    """Of b and t, 0 where the table [.., p / 2] broadcasts to x."""
    if table is None:
        return None
    leading = table.expand(*x.shape[:-2], table.shape[-1]).stride()[:-1]
    return (leading[0], leading[1]) if len(leading) == 2 else (0, leading[0])


def _pointers(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": x for name, x in tensors.items()}


def _strides(**tensors: Tensor | None) -> dict[str, int | None]:
    """Of rows, which lie at even distances."""
    return {f"{name}_stride": None if x is None else x.stride(-2) if x.dim() > 1 else 0 for name, x in tensors.items()}

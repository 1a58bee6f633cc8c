"""Projections in float8 on a GPU: Triton casts, cuBLAS multiplies.

Of 16-bit tensors alone. Of float32 ones Triton 3.6 wrote wrong transposes on an H200, from the same source.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.float8_linear.reference import FORWARD, GRADIENT, SMALLEST, Float8Inputs
from kernels.float8_linear.support import ALIGNED, device_refuses
from kernels.float8_linear.triton_kernels import cast_kernel, largest_kernel
from kernels.gpu.launch import Launch, num_bytes
from kernels.gpu.tuning import ARCHITECTURES, INTERPRETER, Config, architecture
from kernels.operator import Kept, Path, Saved, differentiable
from kernels.shapes_only import is_shapes_only

DTYPES = (torch.bfloat16, torch.float16)
PROGRAMS = 528  # 4 for each multiprocessor of an H100
FLOAT8_ARCHITECTURES = ("sm_90", "sm_100")
FAST_SUMS, EXACT_SUMS = True, False  # whether tensor cores keep sums of many products in fewer bits

CONFIGS = {
    **dict.fromkeys(ARCHITECTURES, Config({"ROWS": 128, "COLUMNS": 128}, num_warps=8)),
    INTERPRETER: Config({"ROWS": 16, "COLUMNS": 32}),
}


class Float8(NamedTuple):
    """A matrix in float8, as it is and transposed, both filled up with zeros to multiples of ALIGNED; and what its
    values are multiplied by."""

    rows: Tensor
    columns: Tensor | None
    inverse: Tensor


def cast(x_rc: Tensor, dtype: torch.dtype, *, transposed: bool) -> Float8:
    """Round a matrix of DTYPES to float8 with one scale; rows are contiguous."""
    filled_rows, filled_width = (_filled(size) for size in x_rc.shape)
    rows = x_rc.new_empty(filled_rows, filled_width, dtype=dtype)
    columns = x_rc.new_empty(filled_width, filled_rows, dtype=dtype) if transposed else None
    made = Float8(rows, columns, x_rc.new_empty((), dtype=torch.float32))
    for launch in plan(x_rc, made, CONFIGS[architecture(x_rc.device)]):
        launch.run()
    return made


def plan(x_rc: Tensor, made: Float8, config: Config) -> list[Launch]:
    """Write `made`: two passes over x, as its scale follows from all of it."""
    num_rows, width = x_rc.shape
    tiles = triton.cdiv(num_rows, config.tiles["ROWS"]) * triton.cdiv(width, config.tiles["COLUMNS"])
    programs = min(PROGRAMS, tiles)
    largest = x_rc.new_empty(programs, dtype=torch.float32)
    sizes = {"num_rows": num_rows, "width": width}
    stride = {"x_stride": x_rc.stride(0)}
    constants = {**config.tiles, "PROGRAMS": programs}
    rounding = {
        **{"LIMIT": torch.finfo(made.rows.dtype).max, "SMALLEST": SMALLEST},
        **{"NUM_LARGEST": programs, "BLOCK_LARGEST": triton.next_power_of_2(programs)},
    }
    return [
        Launch(
            largest_kernel,
            (programs,),
            {"x_ptr": x_rc, "largest_ptr": largest, **sizes, **stride},
            constants,
            num_warps=config.num_warps,
            bytes=num_bytes(x_rc),
        ),
        Launch(
            cast_kernel,
            (programs,),
            {
                **{"x_ptr": x_rc, "largest_ptr": largest, "rows_ptr": made.rows, "columns_ptr": made.columns},
                **{"inverse_ptr": made.inverse, **sizes},
                **{"filled_rows": made.rows.shape[0], "filled_width": made.rows.shape[1], **stride},
            },
            {**rounding, **constants},
            num_warps=config.num_warps,
            bytes=num_bytes(x_rc, made.rows, made.columns),
        ),
    ]


def product(a: Float8, b: Float8, dtype: torch.dtype, fast_sums: bool) -> Tensor:
    """a b^T, both with their rows."""
    scales = (a.inverse, b.inverse)
    return torch._scaled_mm(a.rows, b.rows.t(), *scales, out_dtype=dtype, use_fast_accum=fast_sums)


def _forward(x: Tensor, weight_oi: Tensor, *, save: bool) -> Kept[Tensor]:
    """Keeps transposes alone, in float8: what the backward multiplies by."""
    x_rc = _rows(x)
    x8, w8 = (cast(rows, FORWARD, transposed=save) for rows in (x_rc, _rows(weight_oi.to(x.dtype))))
    y_ro = product(x8, w8, x.dtype, FAST_SUMS)[: x_rc.shape[0], : weight_oi.shape[0]]
    kept = (x8.columns, x8.inverse, w8.columns, w8.inverse)
    return y_ro.view(*x.shape[:-1], -1), kept, (x.dtype, weight_oi.dtype)


def _backward(saved: Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
    (x_columns, x_inverse, w_columns, w_inverse), (dtype, weight_dtype) = saved
    grad_ro = _rows(grad)
    g8 = cast(grad_ro, GRADIENT, transposed=True)
    assert g8.columns is not None
    grad_x = product(g8, Float8(w_columns, None, w_inverse), dtype, EXACT_SUMS)[: grad_ro.shape[0]]
    transposed, x8 = Float8(g8.columns, None, g8.inverse), Float8(x_columns, None, x_inverse)
    grad_weight = product(transposed, x8, torch.float32, EXACT_SUMS)[: grad_ro.shape[1]]
    return grad_x.view(*grad.shape[:-1], -1), grad_weight.to(weight_dtype)


def _filled(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _rows(x: Tensor) -> Tensor:
    """x as [rows, width], rows contiguous."""
    x_rc = x.reshape(-1, x.shape[-1])
    return x_rc if x_rc.stride(1) == 1 else x_rc.contiguous()


def _refuses(inputs: Float8Inputs) -> str | None:
    x = inputs.x
    if torch.compiler.is_compiling():
        return "float8 under torch.compile"
    if x.dtype not in DTYPES:
        return f"casts of {x.dtype} in Triton"
    if x.shape[-1] % ALIGNED:
        return f"{x.shape[-1]} columns, no multiple of {ALIGNED}"
    return device_refuses(x.device) if x.is_cuda and not is_shapes_only() else None


_products = differentiable(_forward, _backward)


def _run(inputs: Float8Inputs) -> Tensor:
    y: Tensor = _products(*inputs)
    return y


float8_linear = Path(_run, _refuses)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches that `make kernel-report` compiles: 32,768 rows of 2,048, on meta tensors."""
    if arch not in FLOAT8_ARCHITECTURES:
        return []
    x = torch.empty(32768, 2048, dtype=torch.bfloat16, device="meta")
    rows, columns, inverse = x.new_empty(x.shape, dtype=FORWARD), x.t().new_empty(2048, 32768, dtype=FORWARD), x[0, 0]
    activations = plan(x, Float8(rows, columns, inverse.float()), CONFIGS[arch])
    gradients = plan(x, Float8(rows.view(GRADIENT), columns.view(GRADIENT), inverse.float()), CONFIGS[arch])
    return [("of x or W", activations), ("of a gradient", gradients)]

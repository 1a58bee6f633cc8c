"""A projection cut into parts on a GPU: products by cuBLAS, in rows filled up; Triton joins the gradients.

With 1,804 columns in 16 bits, no multiple of 16 bytes, cuBLAS takes three times as long as with 1,808 (on an H200).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.gpu.launch import Launch
from kernels.linear.reference import Parts, PartsInputs
from kernels.linear.triton_few_rows import few_rows_cases
from kernels.operator import Path
from kernels.pointwise.triton_path import join

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ALIGNED = 16  # columns: 32 bytes in 16 bits
MANY_ROWS = 256  # from which on it pays to copy the weight into filled rows


class _LinearParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor, widths: tuple[int, int, int], dtype: torch.dtype) -> Any:
        x_ri = x.reshape(-1, x.shape[-1]).to(dtype)
        fill = -sum(widths) % ALIGNED
        weight_oi, ctx.weight_dtype = F.pad(weight_oi.to(dtype), (0, 0, 0, fill)), weight_oi.dtype
        y_ro = x_ri @ weight_oi.t()
        ctx.save_for_backward(x_ri, weight_oi)
        ctx.x_shape, ctx.x_dtype, ctx.widths = x.shape, x.dtype, widths
        ctx.set_materialize_grads(False)
        return tuple(y_ro.view(*x.shape[:-1], -1).split([*widths, fill], -1)[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_ri, weight_oi = ctx.saved_tensors
        grad_ro = x_ri.new_empty(x_ri.shape[0], weight_oi.shape[0])
        join(grads, grad_ro, ctx.widths)
        grad_x = (grad_ro @ weight_oi).to(ctx.x_dtype).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        grad_weight = _product_in(ctx.weight_dtype, grad_ro.t(), x_ri) if ctx.needs_input_grad[1] else None
        return grad_x, None if grad_weight is None else grad_weight[: sum(ctx.widths)], None, None


def _product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a b in a dtype; not rounded to another before, where torch can."""
    if dtype == torch.float32 != a.dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _refuses(inputs: PartsInputs) -> str | None:
    x, weight_oi, widths = inputs
    dtype = _compute_dtype(x)
    if torch.compiler.is_compiling():
        return "torch.compile fills up rows by itself"
    if dtype not in TOLERANCE:
        return f"{dtype} in Triton"
    if x.numel() < MANY_ROWS * x.shape[-1] and not (torch.is_grad_enabled() and weight_oi.requires_grad):
        return f"fewer than {MANY_ROWS} rows, and no gradient is wanted"
    if sum(widths) != weight_oi.shape[0] or x.shape[-1] != weight_oi.shape[1]:
        return "shapes that do not go together"  # torch complains
    return None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that torch's own products would compute in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _run(inputs: PartsInputs) -> Parts:
    return Parts(*_LinearParts.apply(*inputs, _compute_dtype(inputs.x)))


linear_parts = Path(_run, _refuses, TOLERANCE)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches that `make kernel-report` compiles; products of many rows are cuBLAS's."""
    return few_rows_cases(arch)

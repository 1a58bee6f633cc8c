"""Projections on a GPU: which path each takes; and one cut into parts: products by cuBLAS, in rows filled up.

With 1,804 columns in 16 bits, no multiple of 16 bytes, cuBLAS takes three times as long as with 1,808 (on an H200).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.again import keep
from kernels.gpu.launch import Launch
from kernels.linear import products, triton_few_rows, triton_training
from kernels.linear.products import compute_dtype
from kernels.linear.reference import LinearInputs, Parts, PartsInputs
from kernels.linear.triton_few_rows import gated_linear, linear_each
from kernels.linear.triton_training import gated_norm_linear, swiglu
from kernels.operator import Path
from kernels.pointwise.triton_path import join

__all__ = ["gated_linear", "gated_norm_linear", "linear", "linear_each", "linear_parts", "report_cases", "swiglu"]

TOLERANCE = triton_training.TOLERANCE
ALIGNED = 16  # columns: 32 bytes in 16 bits
MANY_ROWS = 256  # from which on it pays to copy the weight into filled rows


class _LinearParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor, widths: tuple[int, int, int], dtype: torch.dtype) -> Any:
        cast_x, filled_oi = x.to(dtype), _filled(weight_oi, dtype)
        y_ro = products.of_rows(cast_x.reshape(-1, x.shape[-1]), filled_oi)
        saved, ctx.restore = keep((cast_x, triton_training.kept_weight(weight_oi, filled_oi)))
        ctx.save_for_backward(*saved)
        ctx.x_dtype, ctx.weight_dtype, ctx.widths = x.dtype, weight_oi.dtype, widths
        ctx.set_materialize_grads(False)
        return tuple(y_ro.view(*x.shape[:-1], -1).split([*widths, -sum(widths) % ALIGNED], -1)[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """x is copied once more if its rows do not follow one another: they are the first ones of each sequence."""
        x, weight_oi = ctx.restore(ctx.saved_tensors)
        x_ri, weight_oi = x.reshape(-1, x.shape[-1]), _filled(weight_oi, x.dtype)
        grad_ro = x_ri.new_empty(x_ri.shape[0], weight_oi.shape[0])
        join(grads, grad_ro, ctx.widths)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = products.gradient_of_rows(grad_ro, weight_oi).to(ctx.x_dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = products.precise_gradient_of_weight(grad_ro, x_ri, ctx.weight_dtype)[: sum(ctx.widths)]
        return grad_x, grad_weight, None, None


def _filled(weight_oi: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype, filled up with rows of zeros; itself if that is what it is."""
    return F.pad(weight_oi.to(dtype), (0, 0, 0, -weight_oi.shape[0] % ALIGNED))


def _refuses(inputs: PartsInputs) -> str | None:
    x, weight_oi, widths = inputs
    dtype = compute_dtype(x)
    if torch.compiler.is_compiling():
        return "torch.compile fills up rows by itself"
    if dtype not in TOLERANCE:
        return f"{dtype} in Triton"
    if x.numel() < MANY_ROWS * x.shape[-1] and not (torch.is_grad_enabled() and weight_oi.requires_grad):
        return f"fewer than {MANY_ROWS} rows, and no gradient is wanted"
    if sum(widths) != weight_oi.shape[0] or x.shape[-1] != weight_oi.shape[1]:
        return "shapes that do not go together"  # torch complains
    return None


def _run(inputs: PartsInputs) -> Parts:
    return Parts(*_LinearParts.apply(*inputs, compute_dtype(inputs.x)))


def _linear(inputs: LinearInputs) -> Tensor:
    return triton_few_rows.linear.run(inputs) if triton_training.refuses(*inputs) else triton_training.linear(inputs)


def _linear_refuses(inputs: LinearInputs) -> str | None:
    return triton_training.refuses(*inputs) and triton_few_rows.linear.refuses(inputs)


linear_parts = Path(_run, _refuses, TOLERANCE)
linear = Path(_linear, _linear_refuses, TOLERANCE)


def report_cases(arch: str) -> list[tuple[str, list[Launch]]]:
    """Launches that `make kernel-report` compiles; products of many rows are cuBLAS's."""
    return triton_few_rows.few_rows_cases(arch)

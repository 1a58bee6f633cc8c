"""Projections in training on a GPU: torch's products, of which less is kept for the backward.

The bits are those of torch's own linear. What is not kept: a copy of x that has other rows or strides; and a product
x that is cheap to compute. The backward of what computed it writes x once more, next to the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.again import keep, keeps_everything, keeps_small_results
from kernels.linear import products
from kernels.linear.reference import GatedNormLinearInputs, LinearInputs, SwiGLUInputs
from kernels.operator import Kept, Path, Saved
from kernels.pointwise import triton_path as pointwise
from kernels.pointwise.reference import GatedNormInputs

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GATED_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # rounded before the gate, too


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor, dtype: torch.dtype) -> Tensor:
        cast_x, cast_oi = x.to(dtype), weight_oi.to(dtype)
        saved, ctx.restore = keep((cast_x, kept_weight(weight_oi, cast_oi)))
        ctx.save_for_backward(*saved)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight_oi.dtype
        return products.of_rows(_rows(cast_x), cast_oi).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_oi = ctx.restore(ctx.saved_tensors)
        grad_ro, grad_x, grad_weight = _rows(grad), None, None
        if ctx.needs_input_grad[0]:
            grad_x = products.gradient_of_rows(grad_ro, weight_oi.to(x.dtype)).view(x.shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = products.gradient_of_weight(grad_ro, _rows(x)).to(ctx.weight_dtype)
        return grad_x, grad_weight, None


def kept_weight(weight_oi: Tensor, cast_oi: Tensor) -> Tensor:
    """What a backward keeps of a weight: its cast, or itself if it casts it again."""
    return cast_oi if keeps_small_results() else weight_oi


def _linear_of(
    forward: Callable[..., Kept[Tensor]], backward: Callable[[Saved, Tensor, Tensor], Any]
) -> Callable[..., Tensor]:
    """The projection of what `forward` gives of its inputs, which is not kept.

    Args: forward, backward: as in `differentiable`; the backward's third argument is where it writes what the forward
        gave once more.
    Returns: a function of the weight and the inputs.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight_oi: Tensor, *inputs: Any) -> Tensor:
            x, tensors, ctx.facts = forward(*inputs, save=True)
            cast_oi = weight_oi.to(x.dtype)
            saved, ctx.restore = keep((kept_weight(weight_oi, cast_oi), *tensors))
            ctx.save_for_backward(*saved)
            ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_oi.dtype
            return products.of_rows(_rows(x), cast_oi).view(*x.shape[:-1], -1)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            weight_oi, *tensors = ctx.restore(ctx.saved_tensors)
            grad_ro, again = _rows(grad), grad.new_empty(ctx.x_shape, dtype=ctx.x_dtype)
            grad_x = products.gradient_of_rows(grad_ro, weight_oi.to(ctx.x_dtype)).view(ctx.x_shape)
            grads = backward(Saved(tuple(tensors), ctx.facts), grad_x, again)
            grad_weight = products.gradient_of_weight(grad_ro, _rows(again)).to(ctx.weight_dtype)
            return grad_weight, *(grads if isinstance(grads, tuple) else (grads,))

    return Function.apply


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


_swiglu_linear = _linear_of(pointwise.gated_product_forward, pointwise.gated_product_backward)
_gated_norm_linear = _linear_of(pointwise.gated_norm_forward, pointwise.gated_norm_backward)


def linear(inputs: LinearInputs) -> Tensor:
    """As torch's, to the bit."""
    x, weight_oi = inputs
    y: Tensor = _Linear.apply(x, weight_oi, products.compute_dtype(x))
    return y


def refuses(x: Tensor, *weights: Tensor) -> str | None:
    """The reason why these are not for training on a GPU, if any. What does not fit together is torch's to refuse."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))):
        return "no gradient is wanted"
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain formulas"
    dtype = products.compute_dtype(x)
    if dtype not in TOLERANCE or x.dtype not in TOLERANCE:
        return f"products of {x.dtype} in {dtype} in Triton"
    if x.dim() < 2 or x.numel() == 0:
        return "no rows"
    return None if autocast or all(weight.dtype == dtype for weight in weights) else "dtypes that differ"


def _swiglu(inputs: SwiGLUInputs) -> Tensor:
    x, gate_up_oi, down_oi = inputs
    return _swiglu_linear(down_oi, linear(LinearInputs(x, gate_up_oi)))


def _gated_norm_refuses(inputs: GatedNormLinearInputs) -> str | None:
    x, gate, norm_weight, eps, weight_oi = inputs
    if keeps_everything():
        return "nothing is made again"
    if gate.dtype != products.compute_dtype(gate):
        return "a product in another dtype than the norm's"
    return pointwise.gated_rms_norm.refuses(GatedNormInputs(x, gate, norm_weight, eps)) or refuses(gate, x, weight_oi)


def _run_gated_norm(inputs: GatedNormLinearInputs) -> Tensor:
    *of_norm, weight_oi = inputs
    return _gated_norm_linear(weight_oi, *of_norm)


def _swiglu_refuses(inputs: SwiGLUInputs) -> str | None:
    return "nothing is made again" if keeps_everything() else refuses(*inputs)


swiglu = Path(_swiglu, _swiglu_refuses, GATED_TOLERANCE)
gated_norm_linear = Path(_run_gated_norm, _gated_norm_refuses, GATED_TOLERANCE)

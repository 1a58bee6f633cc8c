"""The operators in plain torch, their gradients by hand: few passes over memory, and few tensors kept.

A compiler derives and fuses by itself, and does not follow results written into views: it gets the plain formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import Path
from kernels.pointwise import reference
from kernels.pointwise.reference import (
    AddNormInputs,
    BranchInputs,
    GatedInputs,
    GatedNormInputs,
    GateUpInputs,
    KeysAndValues,
    NormInputs,
    RotateBothInputs,
    RotateInputs,
    RotateKeysInputs,
    RowInputs,
    RowLosses,
    SplitInputs,
    SumAndNorm,
    Three,
)


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    normed: Tensor = _RMSNorm.apply(x, weight.to(x.dtype), eps, dtype or x.dtype)
    return normed


def _add_norm(inputs: AddNormInputs) -> SumAndNorm:
    total = inputs.x + inputs.delta
    return SumAndNorm(total, _norm(total, inputs.weight, inputs.eps, inputs.dtype))


def _gated_norm(inputs: GatedNormInputs) -> Tensor:
    return _norm(_gated(inputs.x, inputs.gate), inputs.weight, inputs.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row; reads x and the gradient as few times as can be. Rounded once: an inverse
    rounded to 16 bits would scale a whole row, and the innovation score sees that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grad_outputs
        normed = x * inverse
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        share = (product @ weight.to(product.dtype))[..., None].div_(-x.shape[-1])
        grad_x = (grad * weight).to(product.dtype).addcmul_(normed, share).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def _gated_product(gate_up: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    product: Tensor = _GatedProduct.apply(gate_up)
    return product


class _GatedProduct(torch.autograd.Function):
    """The gradients land side by side too, without a copy."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(grad_outputs[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_outputs[0] * up, gate, grad_input=grad_gate)
        return grad_gate_up


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return x * F.silu(gate)
    product: Tensor = _Gated.apply(x, gate)
    return product


class _Gated(torch.autograd.Function):
    """Keeps its inputs alone, and takes as few passes over memory as can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return F.silu(gate).mul_(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        grad_gate = grad_outputs[0] * x
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return F.silu(gate).mul_(grad_outputs[0]), grad_gate


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    cos, sin = cos[..., None, :], sin[..., None, :]
    sin = -sin if inverse else sin
    if torch.compiler.is_compiling():
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)
    rotated: Tensor = _Rotate.apply(x, cos, sin)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    out = heads_first(x)
    out_low, out_high = out.chunk(2, -1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return out


def heads_first(x: Tensor) -> Tensor:
    """Fresh memory of the shape of x [..., t, h, p] that lies as [..., h, t, p]."""
    return torch.empty_like(x.transpose(-3, -2), memory_format=torch.contiguous_format).transpose(-3, -2)


def _cross_entropy_(inputs: RowInputs) -> RowLosses:
    logits_sv, target_s, z_loss_weight, with_gradient = inputs
    target_s1 = target_s[:, None]
    picked_s1 = logits_sv.gather(1, target_s1)
    log_probs_sv = torch.ops.aten._log_softmax.out(logits_sv, -1, False, out=logits_sv)  # one pass, in place
    nll_s1 = -log_probs_sv.gather(1, target_s1)
    log_z_s1 = picked_s1 + nll_s1
    if with_gradient:
        log_probs_sv.exp_().scatter_add_(1, target_s1, -1 / (1 + 2 * z_loss_weight * log_z_s1))
    return RowLosses(nll_s1[:, 0], log_z_s1[:, 0])


def _rotate_keys(inputs: RotateKeysInputs) -> KeysAndValues:
    k, v = inputs.keys_values.chunk(2, -2)
    return KeysAndValues(_rotate(k, inputs.cos, inputs.sin), k, v)


def _branch(inputs: BranchInputs) -> Three:
    x_btd, num_rows = inputs
    first, second, third = (x_btd if count == x_btd.shape[1] else x_btd[:, :count] for count in num_rows)
    return first, second, third


def _split(inputs: SplitInputs) -> Three:
    first, second, third = inputs.x.split(inputs.widths, -1)
    return first, second, third


TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
rms_norm = Path[NormInputs, Tensor](lambda inputs: _norm(*inputs), tolerance=TOLERANCE)
add_rms_norm = Path(_add_norm, tolerance=TOLERANCE)
gated = Path[GatedInputs, Tensor](lambda inputs: _gated(*inputs), tolerance=TOLERANCE)
gated_rms_norm = Path(_gated_norm, tolerance=TOLERANCE)
gated_product = Path[GateUpInputs, Tensor](lambda inputs: _gated_product(*inputs), tolerance=TOLERANCE)
rotary_table = Path(reference.rotary_table.run, tolerance=TOLERANCE)
rotate = Path[RotateInputs, Tensor](lambda inputs: _rotate(*inputs), tolerance=TOLERANCE)
rotate_both = Path[RotateBothInputs, tuple[Tensor, Tensor]](
    lambda inputs: (_rotate(inputs.x, *inputs.first), _rotate(inputs.x, *inputs.second)), tolerance=TOLERANCE
)
rotate_keys = Path(_rotate_keys, tolerance=TOLERANCE)
branch = Path(_branch, tolerance=TOLERANCE)
split = Path(_split, tolerance=TOLERANCE)
cross_entropy_ = Path(_cross_entropy_, tolerance=TOLERANCE)

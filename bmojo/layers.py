"""Small parts every block uses: RMSNorm, SwiGLU and rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo import fused


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        compute = fused.rms_norm if fused.serves(x) else _RMSNorm.apply
        normed: Tensor = compute(x, self.weight.to(x.dtype), self.eps)
        return normed


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) * W_up x) (arXiv:2002.05202); gate and up are one matrix."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_gated_product(self.gate_up_proj(x)))


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row; the backward by hand reads x and the gradient as few times as can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grad_outputs
        normed = x * inverse
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        share = (product @ weight)[..., None].div_(-x.shape[-1])
        grad_x = (grad * weight).addcmul_(normed, share).mul_(inverse)
        return grad_x, grad_weight, None


def _gated_product(gate_up: Tensor) -> Tensor:
    """By hand, but for a compiler, which derives and fuses by itself and does not follow results written into views."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    product: Tensor = (fused.gated_product if fused.serves(gate_up) else _GatedProduct.apply)(gate_up)
    return product


class _GatedProduct(torch.autograd.Function):
    """SiLU(gate) * up for gate and up side by side; the gradients land side by side too, without a copy."""

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


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * SiLU(gate)."""
    if torch.compiler.is_compiling():  # as in _gated_product
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


class RotaryTable:
    """Cosines and sines of the angles position * theta^(-2i/p); computed in float64, kept in the compute dtype."""

    def __init__(self, position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        """position: integers of any shape [...]; the tables are [..., p / 2]."""
        channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position.device)
        angle = position.to(torch.float64)[..., None] * theta ** (-channel / head_dim)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def rotate(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Rotate the pairs (i, i + p/2) of x [..., h, p], whose leading dimensions broadcast with the table's."""
        cos, sin = self.cos[..., None, :], self.sin[..., None, :]
        sin = -sin if inverse else sin
        if torch.compiler.is_compiling():  # as in _gated_product
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
    # Heads ahead of time in memory, as attention reads them; the shape is x's all the same.
    out = torch.empty_like(x.transpose(-3, -2), memory_format=torch.contiguous_format).transpose(-3, -2)
    out_low, out_high = out.chunk(2, -1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return out

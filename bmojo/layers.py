"""Small parts every block uses: RMSNorm, SwiGLU and rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) * W_up x) (arXiv:2002.05202); gate and up are one matrix."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


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
        rotated: Tensor = _Rotate.apply(x, cos, -sin if inverse else sin)
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
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    out[..., :half] = (low * cos).addcmul_(high, -sin) if low.dtype == cos.dtype else low * cos - high * sin
    out[..., half:] = (high * cos).addcmul_(low, sin) if low.dtype == cos.dtype else high * cos + low * sin
    return out

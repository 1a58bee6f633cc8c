"""Small parts every block uses: RMSNorm, SwiGLU and rotary position embedding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kernels import pointwise
from kernels.linear import linear


class Linear(nn.Linear):
    """A projection without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Of x, or of x * SiLU(gate)."""
        if gate is None:
            return pointwise.rms_norm(x, self.weight, self.eps)
        return pointwise.gated_rms_norm(x, gate, self.weight, self.eps)

    def of_sum(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + delta, and the norm of that; where delta is None, x and its norm."""
        if delta is None:
            return x, self(x)
        return pointwise.add_rms_norm(x, delta, self.weight, self.eps)


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) * W_up x) (arXiv:2002.05202); gate and up are one matrix."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(d_model, 2 * d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(pointwise.gated_product(self.gate_up_proj(x)))


class RotaryTable:
    """Cosines and sines of the angles position * theta^(-2i/p); computed in float64, kept in the compute dtype."""

    def __init__(self, position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        """position: integers of any shape [...]; the tables are [..., p / 2]."""
        self.head_dim, self.theta, self.dtype, self.device = head_dim, theta, dtype, position.device
        self._at: dict[int, RotaryTable] = {}
        channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position.device)
        angle = position.to(torch.float64)[..., None] * theta ** (-channel / head_dim)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def at(self, distance: int) -> RotaryTable:
        """The table of one constant position; computed once for all layers that ask."""
        if distance not in self._at:
            position = torch.tensor(distance, device=self.device)
            self._at[distance] = RotaryTable(position, self.head_dim, self.theta, self.dtype)
        return self._at[distance]

    def first(self, num_positions: int) -> RotaryTable:
        """The table of the first positions of a sequence."""
        table = copy.copy(self)
        table.cos, table.sin = self.cos[:num_positions], self.sin[:num_positions]
        return table

    def rotate(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Rotate the pairs (i, i + p/2) of x [..., h, p], whose leading dimensions broadcast with the table's."""
        return pointwise.rotate(x, self.cos, self.sin, inverse)

    def rotate_both(self, x: Tensor, distance: int) -> tuple[Tensor, Tensor]:
        """x rotated to its positions, and x rotated by `distance`."""
        elsewhere = self.at(distance)
        return pointwise.rotate_both(x, (self.cos, self.sin), (elsewhere.cos, elsewhere.sin))

    def rotate_keys(self, keys_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of keys and values side by side [..., 2 h, p]: keys rotated, keys, values."""
        return pointwise.rotate_keys(keys_values, self.cos, self.sin)

"""Small parts every block uses: projections, RMSNorm, the residual stream, SwiGLU and rotary position embedding.

Each gives the fastest operator that computes it; nothing of that shows in the text of a model that is made of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bmojo.fields import ModelFields
from kernels import pointwise
from kernels.float8_linear import float8_linear
from kernels.linear import gated_norm_linear, linear, linear_each, linear_parts, swiglu
from kernels.shapes_only import counts_as_gpu


class Linear(nn.Linear):
    """A projection without bias, whose matrix starts as normal(0, std)."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.std = std
        self.trains_in_float8 = False  # see bmojo.float8

    def forward(self, x: Tensor) -> Tensor:
        return float8_linear(x, self.weight) if self.is_float8 else linear(x, self.weight)

    def parts(self, x: Tensor, widths: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The projection cut into three along its last dimension, as views."""
        if self.is_float8:
            return pointwise.split(float8_linear(x, self.weight), widths)
        return linear_parts(x, self.weight, widths)

    @property
    def is_float8(self) -> bool:
        """Only where a gradient is wanted: losses of validation are those of the model as it will be used."""
        return self.trains_in_float8 and torch.is_grad_enabled()

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=self.std, generator=generator)


def project_each(x: Tensor, *projections: Linear) -> tuple[Tensor, ...]:
    """Projections of one input, together."""
    return linear_each(x, tuple(projection.weight for projection in projections))


class Residual:
    """A sum x + added that the norm which reads it computes, in one pass over memory."""

    def __init__(self, x: Tensor, added: Tensor | None = None) -> None:
        self.x, self.added = x, added

    def __add__(self, delta: Tensor) -> Residual:
        return Residual(total(self), delta)


def residual(x: Tensor, added: Tensor | None = None) -> Tensor | Residual:
    """The residual stream, which `x = x + f(norm(x))` moves on. A tensor under torch.compile, which fuses by itself."""
    if torch.compiler.is_compiling():
        return x if added is None else x + added
    return Residual(x, added)


def terms(stream: Tensor | Residual) -> tuple[Tensor, Tensor | None]:
    """The tensors that `residual` makes the stream of."""
    return (stream, None) if isinstance(stream, Tensor) else (stream.x, stream.added)


def total(stream: Tensor | Residual) -> Tensor:
    """The stream as one tensor."""
    x, added = terms(stream)
    return x if added is None else x + added


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor | Residual, gate: Tensor | None = None) -> Tensor:
        """Normalize x, or x * SiLU(gate) if a gate is given."""
        if isinstance(x, Residual):
            return self._of_stream(x)
        if gate is None:
            return pointwise.rms_norm(x, self.weight, self.eps, _dtype_of_norm(x))
        return pointwise.gated_rms_norm(x, gate, self.weight, self.eps)

    def projected(self, x: Tensor, gate: Tensor, projection: Linear) -> Tensor:
        """The projection of what `forward` gives with a gate."""
        if projection.is_float8:
            return projection(self(x, gate))
        return gated_norm_linear(x, gate, self.weight, self.eps, projection.weight)

    def _of_stream(self, stream: Residual) -> Tensor:
        """Normalize the stream, which holds the sum from now on."""
        if stream.added is None:
            return self.forward(stream.x)
        dtype = _dtype_of_norm(stream.x)
        stream.x, normed = pointwise.add_rms_norm(stream.x, stream.added, self.weight, self.eps, dtype)
        stream.added = None
        return normed


def _dtype_of_norm(x: Tensor) -> torch.dtype | None:
    """On a GPU the norm writes what the products read, so that no cast follows; None: the dtype of x."""
    return autocast_dtype(x) if counts_as_gpu(x) else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast converts x to for the products that read it; None: it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) * W_up x) (arXiv:2002.05202); gate and up are one matrix."""

    def __init__(self, config: ModelFields) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.d_model, 2 * config.ff_width, config.init_std)
        self.down_proj = Linear(config.ff_width, config.d_model, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj.is_float8 or self.down_proj.is_float8:
            return self.down_proj(pointwise.gated_product(self.gate_up_proj(x)))
        return swiglu(x, self.gate_up_proj.weight, self.down_proj.weight)


class KeysValues(NamedTuple):
    """Keys and values [b, s, h, p] (or [b, h, p] of one token) of positions in the order of s."""

    k: Tensor
    v: Tensor

    def behind(self, past: KeysValues) -> KeysValues:
        """Those of the past, then these."""
        return KeysValues(*(torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past, self, strict=True)))

    def first(self, num_rows: int) -> KeysValues:
        """Those of the first positions."""
        return KeysValues(first(self.k, num_rows), first(self.v, num_rows))


class RotaryTable:
    """Cosines and sines of the angles position * theta^(-2i/p); computed in float64, kept in the compute dtype.

    Computed at the first use, so a model whose mixers do not rotate has no table.
    """

    def __init__(self, position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        """position: integers of any shape [...]; the tables are [..., p / 2]."""
        self.position, self.head_dim, self.theta, self.dtype = position, head_dim, theta, dtype
        self._at: dict[int, RotaryTable] = {}
        self._cos_sin: tuple[Tensor, Tensor] | None = None

    def make(self) -> None:
        """Compute the tables now."""
        _ = self.cos_sin

    @property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """The two tables."""
        if self._cos_sin is None:
            self._cos_sin = pointwise.rotary_table(self.position, self.head_dim, self.theta, self.dtype)
        return self._cos_sin

    def at(self, distance: int) -> RotaryTable:
        """The table of one constant position; computed once for all layers that ask."""
        if distance not in self._at:
            position = torch.full((), distance, device=self.position.device)  # filled in there: no copy to wait for
            self._at[distance] = RotaryTable(position, self.head_dim, self.theta, self.dtype)
        return self._at[distance]

    def first(self, num_positions: int) -> RotaryTable:
        """The table of the first positions of a sequence."""
        table = RotaryTable(self.position, self.head_dim, self.theta, self.dtype)
        cos, sin = self.cos_sin
        table._at, table._cos_sin = self._at, (cos[:num_positions], sin[:num_positions])
        return table

    def rotate(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Rotate the pairs (i, i + p/2) of x [..., h, p], whose leading dimensions broadcast with the table's."""
        return pointwise.rotate(x, *self.cos_sin, inverse)

    def near_and_far(self, q: Tensor, distance: int) -> tuple[Tensor, Tensor]:
        """q rotated to its positions, and q rotated by `distance`."""
        return pointwise.rotate_both(q, self.cos_sin, self.at(distance).cos_sin)

    def rotated_keys(self, keys_values: Tensor) -> tuple[KeysValues, Tensor]:
        """Split keys and values side by side [..., 2 h, p]: keys rotated and values; keys as they are."""
        rotated_k, k, v = pointwise.rotate_keys(keys_values, *self.cos_sin)
        return KeysValues(rotated_k, v), k


def parts(x: Tensor, widths: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x cut into three along its last dimension, as views."""
    return pointwise.split(x, widths)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x cut into two along its last dimension, as views."""
    width = x.shape[-1] // 2
    first, second, _ = pointwise.split(x, (width, width, 0))
    return first, second


def rows_for(x_bt: Tensor, num_rows: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x's first rows along t for each of three readers, as views."""
    return pointwise.branch(x_bt, num_rows)


def first(x_bt: Tensor, num_rows: int) -> Tensor:
    """Its first rows along t, as a view; x itself if it has no more, whose gradient then needs no copy."""
    return x_bt if x_bt.shape[1] == num_rows else x_bt[:, :num_rows]

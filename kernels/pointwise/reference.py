"""Inputs, outputs and formulas of the small operators. Computed in float32 at least, and rounded once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import Path

Table = tuple[Tensor, Tensor]  # cosines and sines
Three = tuple[Tensor, Tensor, Tensor]  # views


class NormInputs(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467).

    Args: x: [..., d].  weight: [d], rounded to the dtype of x except on a GPU.  dtype: of the result; None: of x.
    """

    x: Tensor
    weight: Tensor
    eps: float
    dtype: torch.dtype | None = None


class AddNormInputs(NamedTuple):
    """x + delta, and its rms_norm: a step along the residual stream. x, delta: [..., d]; the rest as in rms_norm."""

    x: Tensor
    delta: Tensor
    weight: Tensor
    eps: float
    dtype: torch.dtype | None = None


class SumAndNorm(NamedTuple):
    total: Tensor
    normed: Tensor


class GatedInputs(NamedTuple):
    """x * SiLU(gate), both of one shape, in the dtype of the gate."""

    x: Tensor
    gate: Tensor


class GatedNormInputs(NamedTuple):
    """RMSNorm(x * SiLU(gate)) * weight over the last dimension.

    Args: x, gate: [..., d].  weight: [d], taken in the dtype of the product.
    """

    x: Tensor
    gate: Tensor
    weight: Tensor
    eps: float


class GateUpInputs(NamedTuple):
    """SiLU(gate) * up for gate and up side by side in the last dimension: [..., 2 d] -> [..., d]."""

    gate_up: Tensor


class TableInputs(NamedTuple):
    """Cosines and sines of the angles position * theta^(-2i/p) of rotary embedding, computed in float64.

    Args: position: integers [...].  head_dim: p.
    Returns: [..., p / 2] each, in `dtype`.
    """

    position: Tensor
    head_dim: int
    theta: float
    dtype: torch.dtype


class RotateInputs(NamedTuple):
    """Rotate the pairs (i, i + p/2) of x by the angles whose cosines and sines are given, or back if `inverse`.

    Args: x: [..., h, p].  cos, sin: [..., p / 2], without gradient; their leading dimensions broadcast with those of x.
    Returns: shape and dtype of x; in memory, heads come ahead of the dimension before them, as attention reads them
        (except on the static path, whose attention reads them in chunks).
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    inverse: bool = False


class RotateBothInputs(NamedTuple):
    """x rotated by one table of cosines and sines, and x rotated by another: see `rotate`."""

    x: Tensor
    first: Table
    second: Table


class RotateKeysInputs(NamedTuple):
    """Keys rotated, keys as they are, and values.

    Args: keys_values: [..., 2 h, p], keys before values.  cos, sin: see `rotate`.
    Returns: [..., h, p] each; the last two are views.
    """

    keys_values: Tensor
    cos: Tensor
    sin: Tensor


class KeysAndValues(NamedTuple):
    rotated: Tensor
    k: Tensor
    v: Tensor


class BranchInputs(NamedTuple):
    """Views of x's first rows (along t), each to go a way of its own; their gradients meet in one pass."""

    x_btd: Tensor
    num_rows: tuple[int, int, int]


class SplitInputs(NamedTuple):
    """x cut into three along its last dimension, as views."""

    x: Tensor
    widths: tuple[int, int, int]


class RowInputs(NamedTuple):
    """Replace each row of logits by softmax - onehot(target) / slope with slope = 1 + 2 z_loss_weight log_z: times its
    slope, it is the gradient of nll + z_loss_weight log_z^2. No gradient passes.

    Args:
        target_s: a class per row, in 0 .. v - 1.
        with_gradient: if False the logits are lost all the same, but what replaces them has no meaning.
    Returns: nll = -log softmax[target] and log_z = logsumexp of each row.
    Raises: IndexError, or RuntimeError: a target is no class. On Triton its loss is NaN instead.
    """

    logits_sv: Tensor
    target_s: Tensor
    z_loss_weight: float = 0.0
    with_gradient: bool = True


class RowLosses(NamedTuple):
    nll_s: Tensor
    log_z_s: Tensor


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = precise / (precise.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(x.dtype)
    return normed.to(dtype or x.dtype)


def _add_norm(inputs: AddNormInputs) -> SumAndNorm:
    total = inputs.x + inputs.delta
    return SumAndNorm(total, _norm(total, inputs.weight, inputs.eps, inputs.dtype))


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    precise = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (x * precise * torch.sigmoid(precise)).to(gate.dtype)


def _gated_product(inputs: GateUpInputs) -> Tensor:
    gate, up = inputs.gate_up.chunk(2, -1)
    return _gated(up, gate)


def _table(inputs: TableInputs) -> Table:
    position, head_dim, theta, dtype = inputs
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position.device)
    angle = position.to(torch.float64)[..., None] * theta ** (-channel / head_dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """As products of complex numbers."""
    precise = torch.promote_types(x.dtype, torch.float32)
    low, high = x.to(precise).chunk(2, -1)
    angle = torch.complex(cos.detach().to(precise), (-sin if inverse else sin).detach().to(precise))[..., None, :]
    turned = torch.complex(low.contiguous(), high.contiguous()) * angle
    joined = torch.cat([turned.real, turned.imag], -1).to(x.dtype)
    return joined.transpose(-3, -2).contiguous().transpose(-3, -2)


def _rotate_keys(inputs: RotateKeysInputs) -> KeysAndValues:
    k, v = inputs.keys_values.chunk(2, -2)
    return KeysAndValues(_rotate(k, inputs.cos, inputs.sin), k, v)


def _cross_entropy_(inputs: RowInputs) -> RowLosses:
    logits_sv, target_s, z_loss_weight, _ = inputs
    log_z_s = logits_sv.logsumexp(-1)
    nll_s = F.cross_entropy(logits_sv, target_s, reduction="none")
    onehot_sv = F.one_hot(target_s, logits_sv.shape[1]) / (1 + 2 * z_loss_weight * log_z_s[:, None])
    logits_sv.copy_(logits_sv.softmax(-1) - onehot_sv)
    return RowLosses(nll_s, log_z_s)


rms_norm = Path[NormInputs, Tensor](lambda inputs: _norm(*inputs))
add_rms_norm = Path(_add_norm)
gated = Path[GatedInputs, Tensor](lambda inputs: _gated(*inputs))
gated_rms_norm = Path[GatedNormInputs, Tensor](
    lambda inputs: _norm(_gated(inputs.x, inputs.gate), inputs.weight, inputs.eps)
)
gated_product = Path(_gated_product)
rotary_table = Path(_table)
rotate = Path[RotateInputs, Tensor](lambda inputs: _rotate(*inputs))
rotate_both = Path[RotateBothInputs, tuple[Tensor, Tensor]](
    lambda inputs: (_rotate(inputs.x, *inputs.first), _rotate(inputs.x, *inputs.second))
)
rotate_keys = Path(_rotate_keys)
cross_entropy_ = Path(_cross_entropy_)

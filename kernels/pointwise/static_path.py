"""The operators from slices, sums and products alone (kernels/static.py); a compiler derives and fuses by itself.

Statistics, gates and rotations are in float32 at least, and rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.operator import Path
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
    SplitInputs,
    SumAndNorm,
    Table,
    TableInputs,
    Three,
)
from kernels.static import parts

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
DIGIT = 1 << 12  # positions and frequencies are multiplied in digits of 12 bits, whose products float32 holds


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return (precise * inverse * weight.to(x.dtype)).to(dtype or x.dtype)


def _add_norm(inputs: AddNormInputs) -> SumAndNorm:
    total = inputs.x + inputs.delta
    return SumAndNorm(total, _norm(total, inputs.weight, inputs.eps, inputs.dtype))


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    precise = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (x * (precise * torch.sigmoid(precise))).to(gate.dtype)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return parts(x, (x.shape[-1] // 2,) * 2)


def _gated_product(inputs: GateUpInputs) -> Tensor:
    gate, up = _halves(inputs.gate_up)
    return _gated(up, gate)


def _table(inputs: TableInputs) -> Table:
    """Angles in turns, of which whole ones are dropped before anything is rounded: no float64.

    A frequency is cut into digits of 12 bits, and a position below 2^24 too. The product of two digits is exact in
    float32, and so is what is left of it without whole turns.
    """
    position, head_dim, theta, dtype = inputs
    turns_per_token = [theta ** (-channel / head_dim) / math.tau for channel in range(0, head_dim, 2)]
    digits = zip(*(_digits(turns % 1) for turns in turns_per_token), strict=True)
    high, low = (position // DIGIT).to(torch.float32), (position % DIGIT).to(torch.float32)
    turns = torch.zeros((*position.shape, len(turns_per_token)), dtype=torch.float32, device=position.device)
    for of_low, of_high in zip(*_frequencies(list(digits), position.device), strict=True):
        turns = turns + _fraction(low[..., None] * of_low) + _fraction(high[..., None] * of_high)
    angle = _fraction(turns) * math.tau
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _frequencies(digits: list[tuple[float, ...]], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """[p / 2] each: what a position's low digit is multiplied by, and its high one, without whole turns."""
    of_low = [torch.tensor(digit, dtype=torch.float32) for digit in digits]
    of_high = [torch.tensor([x * DIGIT % 1 for x in digit], dtype=torch.float32) for digit in digits]
    return [x.to(device) for x in of_low], [x.to(device) for x in of_high]


def _digits(x: float, count: int = 4) -> list[float]:
    """Multiples of falling powers of 1 / DIGIT that sum to x, 0 <= x < 1, to 48 bits."""
    found = []
    for place in range(1, count + 1):
        scale = float(DIGIT**place)
        found.append(math.floor(x * scale) / scale)
        x -= found[-1]
    return found


def _fraction(x: Tensor) -> Tensor:
    """x without whole turns, in [-1/2, 1/2]."""
    return x - torch.floor(x + 0.5)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    low, high = _halves(x.to(torch.promote_types(x.dtype, torch.float32)))
    cos, sin = cos.detach()[..., None, :], sin.detach()[..., None, :]
    sin = -sin if inverse else sin
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


def _rotate_keys(inputs: RotateKeysInputs) -> KeysAndValues:
    heads = inputs.keys_values.shape[-2] // 2
    k, v = parts(inputs.keys_values, (heads, heads), -2)
    return KeysAndValues(_rotate(k, inputs.cos, inputs.sin), k, v)


def _branch(inputs: BranchInputs) -> Three:
    x_btd, num_rows = inputs
    first, second, third = (x_btd if count == x_btd.shape[1] else x_btd[:, :count] for count in num_rows)
    return first, second, third


def _split(inputs: SplitInputs) -> Three:
    first, second, third = parts(inputs.x, inputs.widths)
    return first, second, third


def _refuses_float64(inputs: TableInputs) -> str | None:
    if inputs.dtype == torch.float64:
        return "the static rotary_table is float32"
    return None


rms_norm = Path[NormInputs, Tensor](lambda inputs: _norm(*inputs), tolerance=TOLERANCE)
add_rms_norm = Path(_add_norm, tolerance=TOLERANCE)
gated = Path[GatedInputs, Tensor](lambda inputs: _gated(*inputs), tolerance=TOLERANCE)
gated_rms_norm = Path[GatedNormInputs, Tensor](
    lambda inputs: _norm(_gated(inputs.x, inputs.gate), inputs.weight, inputs.eps), tolerance=TOLERANCE
)
gated_product = Path(_gated_product, tolerance=TOLERANCE)
rotary_table = Path(_table, _refuses_float64, {torch.float32: TOLERANCE[torch.float32]})
rotate = Path[RotateInputs, Tensor](lambda inputs: _rotate(*inputs), tolerance=TOLERANCE)
rotate_both = Path[RotateBothInputs, tuple[Tensor, Tensor]](
    lambda inputs: (_rotate(inputs.x, *inputs.first), _rotate(inputs.x, *inputs.second)), tolerance=TOLERANCE
)
rotate_keys = Path(_rotate_keys, tolerance=TOLERANCE)
branch = Path(_branch, tolerance=TOLERANCE)
split = Path(_split, tolerance=TOLERANCE)

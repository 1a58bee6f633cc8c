"""Inputs and meaning of a product with a weight matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operator import Path
from kernels.pointwise.reference import GatedNormInputs, GateUpInputs, gated_product, gated_rms_norm


class LinearInputs(NamedTuple):
    """x W^T over the last dimension: a projection without bias.

    Args: x: [..., i].  weight_oi: [o, i].
    Raises: RuntimeError: the last dimension of x is not i.
    """

    x: Tensor
    weight_oi: Tensor


class GatedInputs(LinearInputs):
    """SiLU(gate) * up of the gates and ups that x W^T has side by side: [..., i] -> [..., o / 2]."""


class SwiGLUInputs(NamedTuple):
    """W_down(SiLU(W_gate x) * W_up x) (arXiv:2002.05202).

    Args: x: [..., i].  gate_up_oi: W_gate above W_up, [2 f, i].  down_oi: [o, f].
    """

    x: Tensor
    gate_up_oi: Tensor
    down_oi: Tensor


class GatedNormLinearInputs(NamedTuple):
    """The projection W RMSNorm(x * SiLU(gate)). Args: as in pointwise.gated_rms_norm.  weight_oi: W [o, d]."""

    x: Tensor
    gate: Tensor
    norm_weight: Tensor
    eps: float
    weight_oi: Tensor


class ProductInputs(LinearInputs):
    """As linear, for shapes that come again and again. No gradient passes."""


class EachInputs(NamedTuple):
    """x W^T for each of up to three weights: projections of one input. Raises: as linear."""

    x: Tensor
    weights: tuple[Tensor, ...]


class PartsInputs(NamedTuple):
    """x W^T cut into three along its last dimension: a projection whose outputs go three ways.

    Args: x: [..., i].  weight_oi: [o, i].  widths: of the parts; they sum to o.
    Returns: views.
    """

    x: Tensor
    weight_oi: Tensor
    widths: tuple[int, int, int]


class Parts(NamedTuple):
    first: Tensor
    second: Tensor
    third: Tensor


def _run(inputs: LinearInputs) -> Tensor:
    return torch.einsum("...i,oi->...o", *inputs)


linear = Path(_run)
linear_each = Path[EachInputs, tuple[Tensor, ...]](
    lambda inputs: tuple(_run(LinearInputs(inputs.x, weight_oi)) for weight_oi in inputs.weights)
)
gated_linear = Path[LinearInputs, Tensor](lambda inputs: gated_product.run(GateUpInputs(_run(inputs))))
swiglu = Path[SwiGLUInputs, Tensor](
    lambda inputs: _run(LinearInputs(gated_linear.run(LinearInputs(*inputs[:2])), inputs.down_oi))
)
gated_norm_linear = Path[GatedNormLinearInputs, Tensor](
    lambda inputs: _run(LinearInputs(gated_rms_norm.run(GatedNormInputs(*inputs[:4])), inputs.weight_oi))
)
product = Path[LinearInputs, Tensor](torch.no_grad()(_run))
linear_parts = Path[PartsInputs, Parts](
    lambda inputs: Parts(*torch.einsum("...i,oi->...o", *inputs[:2]).split(inputs.widths, -1))
)

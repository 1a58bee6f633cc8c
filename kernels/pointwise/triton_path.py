"""RMSNorm and SwiGLU by liger-kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.gpu import liger
from kernels.operator import Path
from kernels.pointwise import torch_path
from kernels.pointwise.reference import (
    AddNormInputs,
    GatedInputs,
    GatedNormInputs,
    GateUpInputs,
    NormInputs,
    SumAndNorm,
)

# bfloat16: two roundings of 2^-8, on either side.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _refuses(inputs: tuple[Any, ...]) -> str | None:
    return liger.refuses(inputs[0])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Everything between reading x and writing the result is float32 ("gemma", offset 0)."""
    offset, in_place = 0.0, False  # in place: over the gradient, which is not ours to overwrite
    function = liger.function("rms_norm", "LigerRMSNormFunction")
    normed: Tensor = function.apply(x, weight.to(x.dtype), eps, offset, "gemma", in_place)
    return normed


def _add_norm(inputs: AddNormInputs) -> SumAndNorm:
    total = inputs.x + inputs.delta
    return SumAndNorm(total, _norm(total, inputs.weight, inputs.eps))


def _gated_norm(inputs: GatedNormInputs) -> Tensor:
    return _norm(torch_path.gated.run(GatedInputs(inputs.x, inputs.gate)), inputs.weight, inputs.eps)


def _gated_product(inputs: GateUpInputs) -> Tensor:
    function = liger.function("swiglu", "LigerFusedGateUpSiLUMulFunction")
    product: Tensor = function.apply(inputs.gate_up.flatten(0, -2))
    return product.unflatten(0, inputs.gate_up.shape[:-1])


rms_norm = Path[NormInputs, Tensor](lambda inputs: _norm(*inputs), _refuses, TOLERANCE)
add_rms_norm = Path(_add_norm, _refuses, TOLERANCE)
gated_rms_norm = Path(_gated_norm, _refuses, TOLERANCE)
gated_product = Path(_gated_product, _refuses, TOLERANCE)

"""The loss on a GPU: as in plain torch, but logits are in the dtype of the products, where Triton replaces them."""

from __future__ import annotations

import torch

from kernels.cross_entropy.reference import LossInputs, LossOutputs
from kernels.cross_entropy.torch_path import loss_of
from kernels.operator import Path

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def _refuses(inputs: LossInputs) -> str | None:
    dtype = inputs.hidden_sd.dtype
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain formulas"
    if dtype == torch.float16:
        return "in float16 the weight's gradient may underflow"
    return None if dtype in TOLERANCE else f"{dtype} in Triton"


def _run(inputs: LossInputs) -> LossOutputs:
    return loss_of(inputs, inputs.hidden_sd.dtype)


linear_cross_entropy = Path(_run, _refuses, TOLERANCE)

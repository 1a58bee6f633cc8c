"""The loss of a language model: cross-entropy of a projection to the vocabulary. README.md says how."""

from __future__ import annotations

from kernels.cross_entropy import reference, static_path, torch_path, triton_path
from kernels.cross_entropy.reference import LossInputs, LossOutputs
from kernels.operator import Operator

__all__ = ["LossOutputs", "linear_cross_entropy"]

linear_cross_entropy = Operator(
    "linear_cross_entropy",
    LossInputs,
    reference=reference.linear_cross_entropy,
    torch=torch_path.linear_cross_entropy,
    static=static_path.linear_cross_entropy,
    triton=lambda: triton_path.linear_cross_entropy,
    example=reference.example,
    autocast="cast",
)

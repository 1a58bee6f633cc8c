"""The gated delta rule of Gated DeltaNet: a memory that corrects what it holds. Derivation: README.md."""

from __future__ import annotations

from kernels.gated_delta_rule import reference, static_path, torch_path
from kernels.gated_delta_rule.reference import DeltaInputs, StepInputs
from kernels.gated_delta_rule.torch_path import flops_per_position
from kernels.operator import Operator

__all__ = ["flops_per_position", "gated_delta_rule", "gated_delta_step"]

gated_delta_rule = Operator(
    "gated_delta_rule",
    DeltaInputs,
    reference=reference.gated_delta_rule,
    torch=torch_path.gated_delta_rule,
    static=static_path.gated_delta_rule,
    example=reference.example,
)
gated_delta_step = Operator(
    "gated_delta_step", StepInputs, torch=torch_path.gated_delta_step, example=reference.example_step
)

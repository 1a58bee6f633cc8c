"""The delta rule of Kimi Delta Attention: each channel of the keys fades at its own rate. Derivation: README.md."""

from __future__ import annotations

from kernels.channel_delta_rule import reference, static_path, torch_path
from kernels.channel_delta_rule.reference import DeltaInputs, StepInputs
from kernels.channel_delta_rule.torch_path import flops_per_position
from kernels.operator import Operator

__all__ = ["channel_delta_rule", "channel_delta_step", "flops_per_position"]

channel_delta_rule = Operator(
    "channel_delta_rule",
    DeltaInputs,
    reference=reference.channel_delta_rule,
    torch=torch_path.channel_delta_rule,
    static=static_path.channel_delta_rule,
    example=reference.example,
)
channel_delta_step = Operator(
    "channel_delta_step", StepInputs, torch=torch_path.channel_delta_step, example=reference.example_step
)

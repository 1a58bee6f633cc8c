"""Causal depthwise convolution with SiLU, before a state-space model. Derivation: README.md."""

from __future__ import annotations

from torch import Tensor

from kernels.causal_conv1d import cpp_path, reference, static_path, torch_path
from kernels.causal_conv1d.reference import ConvInputs, ConvOutputs, StepInputs
from kernels.operator import Operator, Path

__all__ = ["causal_conv1d", "causal_conv1d_step"]


def _triton() -> Path[ConvInputs, ConvOutputs]:
    from kernels.causal_conv1d import triton_path

    return triton_path.causal_conv1d


def _triton_step() -> Path[StepInputs, Tensor]:
    from kernels.causal_conv1d import triton_path

    return triton_path.causal_conv1d_step


causal_conv1d = Operator(
    "causal_conv1d",
    ConvInputs,
    reference=reference.causal_conv1d,
    torch=torch_path.causal_conv1d,
    static=static_path.causal_conv1d,
    cpp=cpp_path.causal_conv1d,
    triton=_triton,
    check=reference.check,
    example=reference.example,
)
causal_conv1d_step = Operator(
    "causal_conv1d_step",
    StepInputs,
    torch=torch_path.causal_conv1d_step,
    cpp=cpp_path.causal_conv1d_step,
    triton=_triton_step,
    example=reference.example_step,
)

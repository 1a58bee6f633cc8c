"""B'MOJO attention: one softmax over window, fading and eidetic keys. Derivation: README.md."""

from __future__ import annotations

from torch import Tensor

from kernels.memory_attention import cpp_path, reference, static_path, torch_path
from kernels.memory_attention.reference import AttentionInputs, Eidetic, KeysValues, Slots, StepInputs
from kernels.memory_attention.torch_path import attention_mass
from kernels.operator import Operator, Path

__all__ = [
    "AttentionInputs",
    "Eidetic",
    "KeysValues",
    "Slots",
    "StepInputs",
    "attention_mass",
    "memory_attention",
    "memory_attention_step",
]


def _triton() -> Path[AttentionInputs, Tensor]:
    from kernels.memory_attention import triton_path

    return triton_path.memory_attention


def _triton_step() -> Path[StepInputs, Tensor]:
    from kernels.memory_attention import triton_path

    return triton_path.memory_attention_step


memory_attention = Operator(
    "memory_attention",
    AttentionInputs,
    reference=reference.memory_attention,
    torch=torch_path.memory_attention,
    static=static_path.memory_attention,
    cpp=cpp_path.memory_attention,
    triton=_triton,
    check=reference.check,
    example=reference.example,
    autocast="follow",
)
memory_attention_step = Operator(
    "memory_attention_step",
    StepInputs,
    torch=torch_path.memory_attention_step,
    cpp=cpp_path.memory_attention_step,
    triton=_triton_step,
    example=reference.example_step,
    autocast="follow",
)

"""The positions that each chunk keeps verbatim: the running top M by innovation. Derivation: README.md."""

from __future__ import annotations

from torch import Tensor

from kernels.innovation_select import cpp_path, reference, reference_step, static_path, torch_path, torch_step
from kernels.innovation_select.reference import ScoreInputs, SelectInputs
from kernels.innovation_select.reference_step import LOWEST, StepInputs
from kernels.operator import Operator, Path

__all__ = ["LOWEST", "innovation_scores", "innovation_select", "innovation_step"]


def _triton_scores() -> Path[ScoreInputs, Tensor]:
    from kernels.innovation_select import triton_path

    return triton_path.innovation_scores


def _triton_select() -> Path[SelectInputs, Tensor]:
    from kernels.innovation_select import triton_path

    return triton_path.innovation_select


def _triton_step() -> Path[StepInputs, Tensor]:
    from kernels.innovation_select import triton_step

    return triton_step.innovation_step


innovation_scores = Operator(
    "innovation_scores",
    ScoreInputs,
    reference=reference.innovation_scores,
    torch=torch_path.innovation_scores,
    static=static_path.innovation_scores,
    cpp=cpp_path.innovation_scores,
    triton=_triton_scores,
    check=reference.check_scores,
    example=reference.example_scores,
    autocast="follow",
)
innovation_select = Operator(
    "innovation_select",
    SelectInputs,
    reference=reference.innovation_select,
    torch=torch_path.innovation_select,
    static=static_path.innovation_select,
    cpp=cpp_path.innovation_select,
    triton=_triton_select,
    check=reference.check_select,
    example=reference.example_select,
    autocast="follow",
)
innovation_step = Operator(
    "innovation_step",
    StepInputs,
    torch=torch_step.innovation_step,
    cpp=cpp_path.innovation_step,
    triton=_triton_step,
    example=reference_step.example,
    autocast="follow",
)

"""The positions that each chunk keeps verbatim: the running top M by innovation. Derivation: README.md."""

from __future__ import annotations

from torch import Tensor

from kernels.innovation_select import cpp_path, reference, torch_path
from kernels.innovation_select.reference import BestInputs, ScoreInputs, SelectInputs
from kernels.operator import Operator, Path

__all__ = ["innovation_scores", "innovation_select", "keep_best"]


def _triton_scores() -> Path[ScoreInputs, Tensor]:
    from kernels.innovation_select import triton_path

    return triton_path.innovation_scores


def _triton_select() -> Path[SelectInputs, Tensor]:
    from kernels.innovation_select import triton_path

    return triton_path.innovation_select


def _triton_best() -> Path[BestInputs, Tensor]:
    from kernels.innovation_select import triton_path

    return triton_path.keep_best


innovation_scores = Operator(
    "innovation_scores",
    ScoreInputs,
    reference=reference.innovation_scores,
    torch=torch_path.innovation_scores,
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
    cpp=cpp_path.innovation_select,
    triton=_triton_select,
    check=reference.check_select,
    example=reference.example_select,
    autocast="follow",
)
keep_best = Operator(
    "keep_best",
    BestInputs,
    torch=torch_path.keep_best,
    triton=_triton_best,
    example=reference.example_best,
    autocast="follow",
)

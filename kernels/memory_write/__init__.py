"""What decoding does to a token before attention reads it: rotations, and a place in the rings. README.md."""

from __future__ import annotations

from torch import Tensor

from kernels.memory_write import cpp_path, reference, torch_path
from kernels.memory_write.reference import Rings, WriteInputs
from kernels.operator import Operator, Path

__all__ = ["Rings", "memory_write"]


def _triton() -> Path[WriteInputs, Tensor]:
    from kernels.memory_write import triton_path

    return triton_path.memory_write


memory_write = Operator(
    "memory_write",
    WriteInputs,
    torch=torch_path.memory_write,
    cpp=cpp_path.memory_write,
    triton=_triton,
    example=reference.example,
    autocast="follow",
)

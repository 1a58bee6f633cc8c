"""A projection whose operands are rounded to float8, in training. Formats, scales and limits: README.md."""

from __future__ import annotations

from torch import Tensor

from kernels.float8_linear import reference, torch_path
from kernels.float8_linear.reference import Float8Inputs
from kernels.float8_linear.support import ALIGNED, device_refuses
from kernels.operator import Operator, Path

__all__ = ["ALIGNED", "device_refuses", "float8_linear"]


def _triton() -> Path[Float8Inputs, Tensor]:
    from kernels.float8_linear import triton_path

    return triton_path.float8_linear


float8_linear = Operator(
    "float8_linear",
    Float8Inputs,
    reference=reference.float8_linear,
    torch=torch_path.float8_linear,
    triton=_triton,
    check=reference.check,
    example=reference.example,
    autocast="cast",
)

"""The path of operators that are not on kernels/operator.py yet."""

from __future__ import annotations

from torch import Tensor

from kernels.cpp import library
from kernels.operator import HAS_TRITON, PATHS, check_request, use

__all__ = ["HAS_TRITON", "PATHS", "chosen", "use"]


def chosen(x: Tensor) -> str:
    """The path for an operator whose input is x. Raises: as `check_request`."""
    asked = check_request(x)
    if asked is None:
        if x.is_cuda:
            return "triton" if HAS_TRITON else "torch"
        return "cpp" if library.refuses(x) is None else "torch"
    if asked == "cpp":
        return "cpp" if library.refuses(x) is None else "torch"
    return asked

"""liger-kernel (optional): kernels of others in Triton, for a GPU. Some operators have them as their Triton path."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(x: Tensor) -> str | None:
    """The reason why liger cannot compute what is computed from x, if any.

    Not inside torch.compile: Inductor fuses the plain formulas itself, and liger's loss asks the GPU for a number,
    which would break the graph. Not in Triton's interpreter, which lacks what liger uses.
    """
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain formulas"
    if not _is_on_gpu(x):
        return "liger-kernel needs a GPU"
    if x.dtype not in DTYPES:
        return f"{x.dtype} in liger-kernel"
    return None if _is_installed() else "liger-kernel is not installed: pip install -e '.[gpu]'"


def function(module: str, name: str) -> Any:
    """A function or class of liger_kernel.ops."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


@functools.cache
def _is_installed() -> bool:
    found = importlib.util.find_spec("liger_kernel") is not None
    if not found:
        logger.warning(
            "liger-kernel is not installed: RMSNorm, SwiGLU and the loss run as plain torch, which is slower on a GPU. "
            "To install it: pip install -e '.[gpu]'"
        )
    return found


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda

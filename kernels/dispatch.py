"""Which implementation of an operator runs: the one rule.

`triton` for tensors on a CUDA or ROCm device; `cpp` for float32 and float64 on the CPU, where a C++ compiler is at hand
and neither torch.compile nor a dispatch mode looks on; `torch` (chunked, plain torch) elsewhere. An operator that has
no kernel of the chosen kind runs as plain torch. The environment variable BMOJO_KERNELS or `use(...)` can ask for
another of PATHS; `reference` is the slow definitions that tests compare with.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from kernels.cpp import library

PATHS = ("reference", "torch", "cpp", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None

_forced: str | None = None


def chosen(x: Tensor) -> str:
    """The path for an operator whose input is x.

    Raises: ValueError: BMOJO_KERNELS names no path. RuntimeError: it asks for triton where that cannot run, or for cpp
        where it cannot be compiled (BuildError) or loaded (OSError).
    """
    asked = _forced or _checked(os.environ.get("BMOJO_KERNELS"))
    if asked is None:
        if x.is_cuda:
            return "triton" if HAS_TRITON else "torch"
        return "cpp" if library.serves(x) else "torch"
    if asked == "triton":
        _require_triton(x)
    if asked == "cpp":
        library.load()
        return "cpp" if library.serves(x) else "torch"
    return asked


@contextmanager
def use(path: str) -> Iterator[None]:
    """Force a path within a `with` block, for tests."""
    global _forced
    before, _forced = _forced, _checked(path)
    try:
        yield
    finally:
        _forced = before


def _checked(path: str | None) -> str | None:
    if path is not None and path not in PATHS:
        raise ValueError(f"kernel path {path!r} does not exist; set BMOJO_KERNELS to one of {', '.join(PATHS)}.")
    return path


def _require_triton(x: Tensor) -> None:
    if not HAS_TRITON:
        raise RuntimeError("BMOJO_KERNELS=triton, but triton is not installed: pip install triton, or use torch.")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"BMOJO_KERNELS=triton, but the tensors are on {x.device.type!r}. Triton needs a CUDA or ROCm device; to "
            "try the kernels slowly on CPU set TRITON_INTERPRET=1 before Python starts, or use BMOJO_KERNELS=torch."
        )

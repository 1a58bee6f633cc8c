"""Call compiled kernels with torch tensors."""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kernels.cpp import build
from kernels.cpp.constants import MAX_DIMS
from kernels.shapes_only import is_shapes_only

logger = logging.getLogger(__name__)
IN_MEMORY = (Tensor, torch.nn.Parameter)  # subclasses, such as fake and distributed tensors, may have no memory to read
CANNOT_LOAD = (build.BuildError, OSError)
DTYPES = {torch.float32: "float", torch.float64: "double"}
WIDEST_VECTOR = 16  # elements; memory that kernels ask for in whole vectors is a multiple of it


# Tensor<T> of tensor.h, by the number of dimensions; as bytes, because a ctypes structure takes five times as long.
_PACK = [
    struct.Struct(f"@P{dims}q{8 * (MAX_DIMS - dims)}x{dims}q{8 * (MAX_DIMS - dims)}x").pack
    for dims in range(MAX_DIMS + 1)
]
_NONE = bytes(8 + 16 * MAX_DIMS)
_recorders = threading.local()


def refuses(x: Tensor) -> str | None:
    """The reason why kernels cannot run on x, if any: they need float32 or float64 in memory, and no one to trace them.

    What follows torch's own operators gets plain torch: torch.compile, tracing, forward-mode derivatives, subclasses of
    Tensor such as fake tensors, and dispatch modes such as torch's FLOP counter.
    """
    if not x.is_cpu:
        return f"tensors are on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"{x.dtype} on the CPU"
    if is_shapes_only():
        return None if is_available() else "the C++ kernels are not available"
    if type(x) not in IN_MEMORY:
        return f"the tensor is a {type(x).__name__}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a compiler is tracing"
    if _get_current_dispatch_mode() is not None and _recorder() is None:
        return "a dispatch mode is active"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    return None if is_available() else "the C++ kernels are not available"


@functools.cache
def is_available() -> bool:
    """Whether there is a library; the first call compiles it if need be. Says once what is missing."""
    if not build.sources():
        return False
    try:
        load()
    except CANNOT_LOAD as error:
        logger.warning(
            "The C++ kernels are not available, so operators run as plain torch, which trains at about four "
            "fifths of the speed. Reason: %s. (BMOJO_KERNELS=torch asks for plain torch without this warning.)", error
        )  # fmt: skip
        return False
    return True


@functools.cache
def load() -> ctypes.CDLL:
    """The library. Raises: BuildError: it cannot be compiled. OSError: it cannot be loaded."""
    return ctypes.CDLL(str(build.built_library()))


def call(kernel: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel, for floating-point tensors of `dtype`, on as many threads as torch uses.

    Tensors are passed with their sizes and strides, None as a tensor without data, integers as int64_t, floats as
    double; the number of threads is added at the end.
    """
    if is_shapes_only():
        return
    run = _function(kernel, DTYPES[dtype])
    converted = [_converted(argument, dtype) for argument in (*arguments, torch.get_num_threads())]
    add = _recorder()
    if add is not None:
        add(functools.partial(run, *converted))
    if torch.autograd._profiler_enabled():  # asked first, because a range costs more than some of the kernels
        with torch.profiler.record_function(f"cpp::{kernel}"):
            run(*converted)
    else:
        run(*converted)


@contextmanager
def recorded_by(add: Callable[[Callable[[], object]], None]) -> Iterator[None]:
    """Within it, `add` is told each kernel that this thread runs: a function that runs it again on the same memory."""
    before, _recorders.add = _recorder(), add
    try:
        yield
    finally:
        _recorders.add = before


def _recorder() -> Callable[[Callable[[], object]], None] | None:
    return getattr(_recorders, "add", None)


def rows_contiguous(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as most kernels need it: x itself if it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def whole_vectors(width: int) -> int:
    """`width` rounded up to whole vectors of any type."""
    return -(-width // WIDEST_VECTOR) * WIDEST_VECTOR


def require_shapes(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check shapes, which kernels trust. None fits any.

    Raises: ValueError: a tensor's shape is not the one beside it.
    """
    for name, (x, shape) in given.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; the other inputs' shapes ask for {shape}.")


@functools.cache
def _function(kernel: str, dtype: str) -> Any:
    address = ctypes.c_void_p.in_dll(load(), f"{kernel}_{dtype}").value
    assert address is not None
    return ctypes.CFUNCTYPE(None)(address)


def _converted(argument: Tensor | int | float | None, dtype: torch.dtype) -> Any:
    if isinstance(argument, Tensor):
        if not argument.is_cpu or argument.dtype not in (dtype, torch.int64):
            raise TypeError(f"a C++ kernel for {dtype} on CPU got {argument.dtype} on {argument.device}.")
        if type(argument) not in IN_MEMORY:
            raise TypeError(f"a C++ kernel got a {type(argument).__name__}; set BMOJO_KERNELS=torch for such tensors.")
        shape = argument.shape
        return _PACK[len(shape)](argument.data_ptr(), *shape, *argument.stride())
    if argument is None:
        return _NONE
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)

"""What a function runs on the CPU, recorded once and repeated on the same memory: as a CUDA graph is on a GPU.

A decoding step is a few hundred short calls. Most of its time Python decides which kernel runs on which tensors, and
decides the same for every token. A recording repeats the calls alone: the C++ kernels with the arguments that they had,
and torch's operators with the tensors that they had. All memory that the function takes stays its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cpp import library

aten = torch.ops.aten
_UNDEFINED = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
_INTO: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: torch.mm,
    aten.addcmul.default: torch.addcmul,
}  # what can write to a tensor that is there


class Recording(TorchDispatchMode):
    """Within it, what this thread runs is recorded, and runs. What looks at a value may decide by it, and cannot be
    repeated for other values: `refusal` then names the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal: str | None = None
        self._calls: list[Callable[[], object]] = []
        self._kept: list[object] = []  # memory that calls read and write

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._kept.append((args, result))
        if _looks_at_values(func, args):
            self.refusal = self.refusal or str(func)
        elif func._schema.is_mutable:
            self._calls.append(functools.partial(func, *args, **(kwargs or {})))
        elif not func.is_view and func not in _UNDEFINED and _tensors(result):
            self._calls.append(_repeated(func, args, kwargs or {}, result))
        return result

    def add(self, call: Callable[[], object]) -> None:
        """Of a kernel whose tensors are alive."""
        self._calls.append(call)

    def repeat(self) -> None:
        """Run it again. Inputs and results are where they were."""
        for call in self._calls:
            call()


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run a function and record it. The function returned runs it again, and overwrites the tensor it returned before;
    its first call gives the result of the recording. What cannot be recorded runs as it is."""
    recording = Recording()
    with recording, library.recorded_by(recording.add):
        result = function()
    first = [result]

    def again() -> Tensor:
        if first:
            return first.pop()
        if recording.refusal is not None:
            return function()
        recording.repeat()
        return result

    return again


def _looks_at_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host waits for a value, or a shape depends on one."""
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _repeated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Callable[[], object]:
    """A call whose results go where they went."""
    into = _INTO.get(func)
    if into is not None:
        return functools.partial(into, *args, **kwargs, out=result)

    def call() -> None:
        again = func(*args, **kwargs)
        for old, new in zip(_tensors(result), _tensors(again), strict=True):
            old.copy_(new)

    return call


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, list | tuple) else [result]
    return [x for x in found if isinstance(x, Tensor)]

"""In Triton's interpreter, every load and store must lie within the memory of one of the kernel's arguments.

On a GPU what lies beyond is another tensor's, or nobody's: numbers that no comparison sees, or an error elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

_memory: list[tuple[int, int]] = []  # of the kernel that runs: [first, end) of each argument's storage


def check_every_access() -> None:
    """From now on, in this process."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def prepare_and_note(self: Any, args: Any, kwargs: Any) -> Any:
        prepared = prepare(self, args, kwargs)
        _memory[:] = [range_ for group in prepared for range_ in _ranges(group)]
        return prepared

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _require_inside(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _require_inside(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    executor._init_args_hst = prepare_and_note
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def _ranges(argument: Any) -> list[tuple[int, int]]:
    if isinstance(argument, torch.Tensor):
        storage = argument.untyped_storage()
        return [(storage.data_ptr(), storage.data_ptr() + storage.nbytes())]
    if isinstance(argument, TensorDescriptor):
        return _ranges(argument.base)
    if isinstance(argument, dict):
        argument = tuple(argument.values())
    return [range_ for part in argument for range_ in _ranges(part)] if isinstance(argument, (tuple, list)) else []


def _require_inside(pointers: Any, mask: Any) -> None:
    address = np.atleast_1d(np.asarray(pointers.data))
    address = address[np.broadcast_to(np.atleast_1d(np.asarray(mask.data)).astype(bool), address.shape)]
    size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
    inside = np.zeros(address.shape, bool)
    for first, end in _memory:
        inside |= (address >= first) & (address + size <= end)
    assert inside.all(), f"{(~inside).sum()} of {inside.size} accesses are outside of the arguments' memory"

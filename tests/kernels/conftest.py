"""Fixtures of the operators' tests. tests/conftest.py selects Triton's interpreter; with TRITON_INTERPRET=0 the tests
of Triton paths (test_triton.py) run on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.kernels.bounds import check_every_access
from tests.kernels.memory import memory_of_nan

if os.environ["TRITON_INTERPRET"] == "1":
    check_every_access()

MAKES_A_TENSOR = {
    torch.arange,
    torch.full,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
}


class OnGpu(TorchFunctionMode):
    """New tensors have the values they would have on the CPU, and are on the GPU."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.cuda() if func in MAKES_A_TENSOR and "device" not in (kwargs or {}) else made


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Device of the tests of Triton paths."""
    if os.environ["TRITON_INTERPRET"] == "1" or request.path.name != "test_triton.py":
        yield
        return
    with OnGpu():
        yield


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """See memory_of_nan."""
    with memory_of_nan():
        yield


@pytest.fixture
def each_number_of_threads() -> Iterator[Iterator[int]]:
    """Sets torch's threads to 1, 2 and 3 in turn."""
    before = torch.get_num_threads()

    def numbers() -> Iterator[int]:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            yield number

    yield numbers()
    torch.set_num_threads(before)

"""What tests of Triton kernels share. tests/conftest.py chooses Triton's interpreter; with TRITON_INTERPRET=0 they run
on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

MAKES_A_TENSOR = {
    torch.arange, torch.full, torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip
GPU_TESTS = ("test_triton_causal_conv1d", "test_triton_innovation_select", "test_triton_memory_attention",
             "test_triton_ssd_scan")  # fmt: skip


class OnGpu(TorchFunctionMode):
    """New tensors have the values they would have on the CPU, and are on the GPU."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.cuda() if func in MAKES_A_TENSOR and "device" not in (kwargs or {}) else made


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where tests of Triton kernels run."""
    if os.environ["TRITON_INTERPRET"] == "1" or request.module.__name__ not in GPU_TESTS:
        yield
        return
    with OnGpu():
        yield


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: the largest value), so that an output a kernel leaves unwritten shows."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

"""A device named `neuron` without memory: tensors of FakeTensorMode can be on it, and autocast knows it.

For a process of its own: torch has one name to give away, and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from kernels.operator import NEURON

KEY = "AutocastPrivateUse1"
IN_LOW_PRECISION = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
IN_FLOAT32 = ("exp", "log", "rsqrt", "softplus", "logsumexp", "softmax.int", "pow.Tensor_Scalar", "mean.dim")
_kept: list[torch.library.Library] = []  # a library that is collected takes its registrations along


class Module:
    """What torch asks of `torch.neuron`."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """There are no random numbers on the device."""


def register() -> None:
    """Name the device, once. Autocast follows CUDA's lists, as far as the models meet them."""
    _setup_privateuseone_for_python_backend(NEURON, backend_module=Module())
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, KEY)
    for names, precise in ((IN_LOW_PRECISION, False), (IN_FLOAT32, True)):
        for name in names:
            aten.impl(name, _casting(name, precise), KEY)
    _kept.extend((rest, aten))


def _casting(name: str, precise: bool) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if precise else torch.get_autocast_dtype(NEURON)
        with torch.autocast(NEURON, enabled=False):
            return operator(*(_cast(x, dtype) for x in args), **kwargs)

    return run


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

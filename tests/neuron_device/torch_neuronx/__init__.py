"""A stand-in for AWS's torch_neuronx: a device `neuron` in the host's memory. It shows nothing about the real one.

Tests put the folder around it on PYTHONPATH, so that training runs unchanged. What it offers is what
pipelines/neuron/runtime.py uses. It is not used by anything but tests.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from torch_neuronx import build

_native = build.load()
_started = False


def get_executed_ops() -> dict[str, int]:
    """How often each operator ran on the device since the last `clear_op_tracking`; copies and collectives too."""
    return dict(_native.executed())


def get_fallback_ops() -> list[str]:
    """Operators that ran on the CPU instead: those that a test says in NEURON_SIMULATED_FALLBACK."""
    return [name for name in os.environ.get("NEURON_SIMULATED_FALLBACK", "").split(",") if name]


def clear_op_tracking() -> None:
    """Forget what ran."""
    _native.clear_executed()


def memory_allocated(device: object = None) -> int:
    """Bytes held now."""
    held: int = _native.allocated()[0]
    return held


def max_memory_allocated(device: object = None) -> int:
    """Most bytes held so far."""
    held: int = _native.allocated()[1]
    return held


class _Device(ModuleType):
    """torch.neuron."""

    # Work is done when it is asked for, so streams and events have nothing to order: those of torch.cpu.
    Stream, Event = torch.cpu.Stream, torch.cpu.Event

    def current_stream(self, device: object = None) -> torch.cpu.Stream:
        return torch.cpu.current_stream()

    def stream(self, stream: torch.cpu.Stream) -> AbstractContextManager[None]:
        return torch.cpu.stream(stream)

    def is_available(self) -> bool:
        return self.device_count() > 0

    def device_count(self) -> int:
        return int(os.environ.get("NEURON_SIMULATED_DEVICES", "1"))

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        pass

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _register() -> None:
    torch.utils.rename_privateuse1_backend("neuron")
    torch._register_device_module("neuron", _Device("torch.neuron"))
    torch.utils.generate_methods_for_privateuse1_backend()
    _native.register_hooks()
    dist.Backend.register_backend("neuron", _new_group, devices="neuron")


def _new_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    visible = os.environ.get("NEURON_RT_VISIBLE_CORES", os.environ.get("LOCAL_RANK", ""))
    if not visible.isdigit():
        raise RuntimeError(f"expected exactly one core per process, found NEURON_RT_VISIBLE_CORES={visible!r}")
    return _native.group(dist.ProcessGroupGloo(store, rank, size, timeout))


_register()

"""Run operators for the tensors they make alone: on fake tensors, along a path of the device asked for.

Memory is planned with it (pipelines/stages/train/planning): every output, saved tensor and workspace that a path makes
in Python exists, with its size, and no kernel runs. What a kernel allocates inside itself is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Device = Literal["cpu", "gpu", "neuron"]

_device: Device | None = None


@contextmanager
def shapes_only(device: Device) -> Iterator[None]:
    """Within it operators choose their path as for tensors on `device`, and leave their kernels out.

    The tensors themselves are fake ones on the CPU, whose backward runs where there is no GPU.
    """
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def is_shapes_only() -> bool:
    """Whether kernels are left out."""
    return _device is not None


def counts_as_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU, or stands for a tensor that would be."""
    return x.is_cuda if _device is None else _device == "gpu"


def counts_as_cpu(x: Tensor) -> bool:
    """Whether x is on the CPU, and stands for no tensor elsewhere."""
    return x.is_cpu if _device is None else _device == "cpu"


def stands_for_neuron() -> bool:
    """Whether tensors stand for those of a NeuronCore."""
    return _device == "neuron"

"""All operators at once: what runs on this machine. Not part of an exported model."""

from __future__ import annotations

import importlib
import pkgutil

import torch
from torch import Tensor

import kernels
from kernels.operator import OPERATORS, Choice


def load_all() -> None:
    """Import every package that declares operators."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"kernels.{module.name}")


def planned(device: torch.device | None = None) -> list[Choice]:
    """The path that each operator would take for float32 tensors on a device, and why. None: a GPU if there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load_all()
    choices = []
    for _, operator in sorted(OPERATORS.items()):
        inputs = operator.example()
        moved = [x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
        choices.append(operator.choose(*moved))
    return choices

"""The launches to compile: what each operator's `report_cases` plans, on tensors that hold no memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import kernels
from kernels.gpu.launch import Launch

KERNELS = Path(kernels.__path__[0])


@dataclass(frozen=True)
class Case:
    """The launches of one call, in order."""

    operator: str
    name: str
    launches: tuple[Launch, ...]


def operators() -> list[str]:
    """Names of the operators that have Triton kernels of ours."""
    files = KERNELS.glob("*/triton_path.py")
    return sorted(file.parent.name for file in files if "def report_cases" in file.read_text(encoding="utf-8"))


def cases(operator: str, arch: str) -> Iterator[Case]:
    """The calls of an operator at its representative sizes, with its default configuration for an architecture."""
    module = importlib.import_module(f"kernels.{operator}.triton_path")
    for name, launches in module.report_cases(arch):
        yield Case(operator, name, tuple(launches))

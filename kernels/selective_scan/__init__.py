"""The recurrence of Mamba-1: a diagonal state for every channel. Derivation: README.md."""

from __future__ import annotations

from kernels.operator import Operator
from kernels.selective_scan import reference, static_path, torch_path
from kernels.selective_scan.reference import SelectiveInputs

__all__ = ["selective_scan"]

selective_scan = Operator(
    "selective_scan",
    SelectiveInputs,
    reference=reference.selective_scan,
    torch=torch_path.selective_scan,
    static=static_path.selective_scan,
    example=reference.example,
)

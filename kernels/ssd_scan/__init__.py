"""The fading memory's recurrence (Mamba-2, state-space duality). Derivation: README.md."""

from __future__ import annotations

from torch import Tensor

from kernels.operator import Operator, Path
from kernels.ssd_scan import cpp_path, nki_path, reference, static_path, torch_path
from kernels.ssd_scan.reference import ScanInputs, ScanOutputs, StepInputs

__all__ = ["ssd_scan", "ssd_step"]


def _triton() -> Path[ScanInputs, ScanOutputs]:
    from kernels.ssd_scan import triton_path

    return triton_path.ssd_scan


def _nki() -> Path[ScanInputs, ScanOutputs]:
    return nki_path.ssd_scan


def _triton_step() -> Path[StepInputs, Tensor]:
    from kernels.ssd_scan import triton_path

    return triton_path.ssd_step


ssd_scan = Operator(
    "ssd_scan",
    ScanInputs,
    reference=reference.ssd_scan,
    torch=torch_path.ssd_scan,
    static=static_path.ssd_scan,
    nki=_nki,
    cpp=cpp_path.ssd_scan,
    triton=_triton,
    check=reference.check,
    example=reference.example,
)
ssd_step = Operator(
    "ssd_step",
    StepInputs,
    torch=torch_path.ssd_step,
    cpp=cpp_path.ssd_step,
    triton=_triton_step,
    check=reference.check_step,
    example=reference.example_step,
)

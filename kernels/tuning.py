"""Which tile sizes, warps and pipeline stages a Triton kernel is launched with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kernels.launch import Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
INTERPRETER = "interpreter"  # small tiles, so that small shapes still cross tile borders


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel; tiles: its tile-size constants, by name."""

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


def architecture(device: torch.device) -> str:
    """The nearest of ARCHITECTURES, or INTERPRETER for CPU tensors."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major > 9 else "sm_80")


def choose(
    operator: str,
    arch: str,
    candidates: Sequence[Config],
    key: Hashable,
    plan: Callable[[Config], Sequence[Launch]],
) -> Config:
    """The configuration to launch with; the first candidate is the one that needs no tuning run.

    Args:
        operator, arch, key: what a tuned choice is remembered under; key: the sizes and dtypes that matter.
        plan: the launches of a call with one candidate, to time it.
    """
    return candidates[0]


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the limit a call exceeds."""
    if not condition:
        raise ValueError(message)

"""Tile sizes, warps and pipeline stages that a Triton kernel is launched with.

The first of an operator's candidates, unless BMOJO_AUTOTUNE=1: then each is timed once on the GPU, and what was fastest
is remembered, in memory and in a file of the user's cache folder, for that device and version of Triton.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from base.cache import cache_dir
from kernels.gpu.launch import Launch
from kernels.shapes_only import is_shapes_only

logger = logging.getLogger(__name__)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
UNREADABLE = (OSError, ValueError, TypeError, AttributeError)  # what a file that is missing or corrupt may raise
INTERPRETER = "interpreter"  # small tiles, so that small shapes still cross tile borders


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    tiles: its tile-size constants, by name.  max_registers: per thread, so that more blocks share a processor; None:
        as the compiler likes.
    """

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None


@torch.compiler.assume_constant_result  # torch.compile cannot trace into what asks the driver
def architecture(device: torch.device) -> str:
    """The nearest of ARCHITECTURES, or INTERPRETER for CPU tensors."""
    if is_shapes_only():
        return "sm_90"
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # the rest, sm_120 too, has no more shared memory than sm_80


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
        plan: the launches of a call with one candidate, to time it: they run many times over.
    """
    if len(candidates) == 1 or arch == INTERPRETER or os.environ.get("BMOJO_AUTOTUNE") != "1":
        return candidates[0]
    name = f"{operator} {arch} {key!r}"
    known = _remembered()
    if known.get(name) not in candidates:
        known[name] = _fastest(candidates, plan)
        _write(known)
        logger.info("%s: of %d configurations %s is the fastest", name, len(candidates), known[name])
    return known[name]


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the limit a call exceeds."""
    if not condition:
        raise ValueError(message)


def _fastest(candidates: Sequence[Config], plan: Callable[[Config], Sequence[Launch]]) -> Config:
    """The candidate whose launches take least time; the first if none fits, whose own launch then says why."""
    times_ms: dict[int, float] = {}
    for index, candidate in enumerate(candidates):
        try:
            times_ms[index] = _time_ms(plan(candidate))
        except OutOfResources as error:
            logger.info("%s does not fit: %s", candidate, error)
    return candidates[min(times_ms, key=lambda index: times_ms[index], default=0)]


def _time_ms(launches: Sequence[Launch]) -> float:
    def call() -> None:
        for launch in launches:
            launch.run()

    return float(do_bench(call, return_mode="median"))


@functools.cache
def _remembered() -> dict[str, Config]:
    """Choices made on this device before, by this process or another; a file that cannot be read counts as none."""
    file = _cache_file()
    try:
        return _read(file)
    except FileNotFoundError:
        return {}
    except UNREADABLE as error:
        logger.warning("the tuned configurations in %s are not used (%s); new ones replace them.", file, error)
        return {}


def _read(file: Path) -> dict[str, Config]:
    return {name: Config(**config) for name, config in json.loads(file.read_text(encoding="utf-8")).items()}


def _write(known: Mapping[str, Config]) -> None:
    """Add to the file, and all at once, so that another process never reads half of it."""
    file = _cache_file()
    with contextlib.suppress(*UNREADABLE):
        known = {**_read(file), **known}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as part:
            json.dump({name: dataclasses.asdict(config) for name, config in known.items()}, part, indent=1)
        os.replace(part.name, file)
    except OSError as error:
        logger.warning("tuned configurations cannot be kept in %s (%s); they are tuned again next time.", file, error)


def _cache_file() -> Path:
    device = re.sub(r"[^\w.-]+", "-", _device_name())
    return cache_dir() / f"tuning-{device}-{triton.__version__}.json"


def _device_name() -> str:
    return torch.cuda.get_device_name()

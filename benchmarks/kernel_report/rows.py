"""One row of the report: a launch, what it compiled to, and the least time it can take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks.kernel_report.cases import Case
from benchmarks.kernel_report.compiled import Code, compile_launch
from benchmarks.kernel_report.occupancy import Occupancy, occupancy
from benchmarks.kernel_report.targets import Target
from kernels.gpu.launch import Launch


@dataclass(frozen=True)
class Row:
    """code, occupancy: None if the kernel did not compile; error then gives the reason."""

    target: str
    operator: str
    case: str
    kernel: str
    constants: dict[str, int | float | bool | str | None]
    num_warps: int
    num_stages: int
    programs: int
    flops: int
    bytes: int
    roofline_s: float
    code: Code | None
    occupancy: Occupancy | None
    error: str = ""

    @property
    def label(self) -> str:
        return f"{self.target} {self.operator}: {self.case}: {self.kernel}"


def compile_cases(cases: Iterable[Case], target: Target, tell: Callable[[str], None]) -> Iterator[Row]:
    """Compile every launch; call `tell` with a line after each."""
    todo = [(case, launch) for case in cases for launch in case.launches]
    for number, (case, launch) in enumerate(todo, 1):
        start = time.perf_counter()
        row = _row(case, launch, target)
        tell(f"[{number:>2}/{len(todo)}] {row.label}: {_outcome(row)} ({time.perf_counter() - start:.1f} s)")
        yield row


def _row(case: Case, launch: Launch, target: Target) -> Row:
    code, error = None, ""
    try:
        code = compile_launch(launch, target)
    except Exception as failure:  # a row of its own: the other kernels still get theirs
        error = f"{type(failure).__name__}: {failure}"
    return Row(
        target=target.name, operator=case.operator, case=case.name, kernel=launch.name,
        constants={name: plain(value) for name, value in launch.constants.items()},
        num_warps=launch.num_warps, num_stages=launch.num_stages, programs=math.prod(launch.grid),
        flops=launch.flops, bytes=launch.bytes, roofline_s=target.roofline_s(launch.flops, launch.bytes),
        code=code, occupancy=occupancy(code, target) if code else None, error=error,
    )  # fmt: skip


def plain(value: object) -> int | float | bool | str | None:
    return value if isinstance(value, int | float | bool | str | None) else str(value)


def _outcome(row: Row) -> str:
    if row.code is None:
        return f"does not compile: {row.error.splitlines()[0]}"
    return f"{row.code.registers} registers, {row.code.spilled_bytes} bytes spilled"

"""The report as Markdown and JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.kernel_report.compiled import Code, ptxas_tool
from benchmarks.kernel_report.rows import Row
from benchmarks.kernel_report.targets import TARGETS, Target

COLUMNS = (
    "case | kernel | warps x stages | registers | spilled, B | shared, KiB | blocks (warps) per processor | "
    "limited by | matrix instructions | programs | GFLOP | MB | FLOP/B | roofline, µs"
)
ALIGNMENT = "--- | --- | --- | --: | --: | --: | --: | --- | --- | --: | --: | --: | --: | --:"
EXPLANATION = """\
Compiled ahead of time: nothing here ran on a GPU and no speed is claimed. Registers and spilled bytes are per thread,
as `ptxas -v` (NVIDIA) and the assembly's metadata (AMD, accumulators included) state them; shared memory is per block.
Blocks and warps on a processor (SM, CU) are what its registers, shared memory and schedulers have room for, by formula.
Matrix instructions are counted as they stand in the code. GFLOP (matrix products only) and MB (to and from memory) are
per call, by formula; the roofline is the longer of the two at the device's peaks: no kernel goes below it."""


def environment() -> dict[str, str]:
    """Date, commit and versions that the figures depend on."""
    import torch
    import triton

    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": ptxas_tool(TARGETS["sm_90"]).version,
        "ptxas-blackwell": ptxas_tool(TARGETS["sm_100"]).version,
        "python": platform.python_version(),
    }


def as_json(rows: Sequence[Row], where: dict[str, str]) -> str:
    used = {row.target for row in rows}
    document: dict[str, Any] = {
        **where,
        "targets": [dataclasses.asdict(target) for name, target in TARGETS.items() if name in used],
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return json.dumps(document, indent=1) + "\n"


def as_markdown(rows: Sequence[Row], where: dict[str, str]) -> str:
    """The page: one section per target, one table per operator, one line per kernel of a case, and their sum."""
    versions = ", ".join(f"{name} {value}" for name, value in where.items() if name != "date")
    title = f"# Kernels, compiled ahead of time ({where['date']})"
    parts = [title, versions, EXPLANATION, _target_table()]
    for name, of_target in groupby(rows, key=lambda row: row.target):
        target = TARGETS[name]
        parts.append(f"## {name} ({target.device})")
        for operator, of_operator in groupby(of_target, key=lambda row: row.operator):
            calls = [list(of_call) for _, of_call in groupby(of_operator, key=lambda row: row.case)]
            lines = [line for of_call in calls for line in _call_lines(of_call, target)]
            parts.append("\n".join([f"**{operator}**\n", f"| {COLUMNS} |", f"| {ALIGNMENT} |", *lines]))
    return "\n\n".join(parts) + "\n"


def write(folder: Path, name: str, markdown: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.md"
    file.write_text(markdown, encoding="utf-8")
    return file


def _call_lines(rows: Sequence[Row], target: Target) -> list[str]:
    """One line per launch, and their sum if there are several."""
    lines = [_line(row, target) for row in rows]
    if len(rows) > 1:
        flops, num_bytes = sum(row.flops for row in rows), sum(row.bytes for row in rows)
        roofline_s = sum(row.roofline_s for row in rows)
        start = f"| {rows[0].case} | *all {len(rows)} launches*" + " |" * 9
        lines.append(f"{start} {' | '.join(_work(flops, num_bytes, roofline_s))} |")
    return lines


def _line(row: Row, target: Target) -> str:
    start = f"| {row.case} | `{row.kernel}` | {row.num_warps} x {row.num_stages}"
    if row.code is None or row.occupancy is None:
        return f"{start} | {failure(row.error)} |"
    code, fit = row.code, row.occupancy
    cells = [
        start, code.registers, code.spilled_bytes, f"{code.shared_bytes / 1024:.1f}", f"{fit.blocks} ({fit.warps})",
        fit.limited_by, instructions(code), f"{row.programs:,}", *_work(row.flops, row.bytes, row.roofline_s),
    ]  # fmt: skip
    return " | ".join(map(str, cells)) + " |"


def _work(flops: int, num_bytes: int, roofline_s: float) -> list[str]:
    intensity = flops / num_bytes if num_bytes else 0.0
    return [f"{flops / 1e9:,.1f}", f"{num_bytes / 1e6:,.1f}", f"{intensity:.0f}", f"{roofline_s * 1e6:,.1f}"]


def instructions(code: Code) -> str:
    return ", ".join(f"{count} {name}" for name, count in code.matrix_instructions.items()) or "none"


def failure(error: str) -> str:
    return "does not compile: " + error.partition("\n")[0].replace("|", "\\|")


def _target_table() -> str:
    lines = [
        "| target | registers | warps | blocks | shared, KiB (per block) | device | bf16 TFLOP/s | TB/s | sources |",
        "| --- | --: | --: | --: | --: | --- | --: | --: | --- |",
    ]
    lines += [
        f"| {target.name} | {4 * target.registers_per_partition:,} | {target.max_warps} | {target.max_blocks} | "
        f"{target.shared_bytes // 1024} ({target.max_shared_bytes // 1024}) | {target.device} | "
        f"{target.peak_flops / 1e12:,.1f} | {target.peak_bytes / 1e12:.2f} | "
        f"{target.limits_source}; {target.peaks_source} |"
        for target in TARGETS.values()
    ]
    return "\n".join(lines)


def _commit() -> str:
    """The checkout's commit, marked if files differ from it."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of the page: by target, then operator."""
    order = list(TARGETS)
    return sorted(rows, key=lambda row: (order.index(row.target), row.operator))

"""The page that sets our kernels beside a peer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.kernel_report import table
from benchmarks.kernel_report.compiled import Code
from benchmarks.kernel_report.occupancy import occupancy
from benchmarks.kernel_report.targets import TARGETS, Target

NOTES = """\
The peer is fla-core {version}. Its public functions were called on tensors without memory while Triton was told that
the target's device is there: kernels, arguments and configurations are those its own host code chooses. Every
configuration that its autotuner would try was compiled ("tried", and how many of them spill; in brackets the range of
all); the row is one that fits and spills least, and of these the one with which most warps share a processor: which is
fastest a GPU must tell. MB is the least traffic a launch can have, every tensor argument moved once, counted alike for
both. Nothing here ran on a GPU. README.md gives the reasons where ours takes more.

- `ssd_scan` beside `chunk_simple_gla`: 32 heads of 64 channels. simple_gla has no groups, so B and C come repeated for
  each head; it multiplies by neither dt nor D, and what does so around it is not counted.
- `causal_conv1d` beside `fla.modules.causal_conv1d` (its Triton path): 4096 channels, width 4, SiLU.
- `memory_attention` beside `parallel_attn` with a window of 512: 16 query heads, 4 key/value heads. The peer has only a
  window, so call by call it is ours without the other sets; with them it is listed below. The peer writes float32
  gradients of keys and values for each query head, and what sums them up is not counted.
- `innovation_select` has no peer."""
HEADER = (
    "| case | library | kernel | tried (spill) | warps x stages | registers | spilled, B | shared, KiB "
    "| blocks (warps) | matrix instructions | MB |\n"
    "| --- | --- | --- | --: | --- | --: | --: | --: | --: | --- | --: |"
)


@dataclasses.dataclass(frozen=True)
class PeerRow:
    """A kernel of a call in one configuration.

    tried, spilling: how many configurations there were, and spilled.  registers, shared_bytes: their least and most.
    """

    target: str
    operator: str
    library: str
    case: str
    kernel: str
    tried: int
    spilling: int
    registers: tuple[int, int]
    shared_bytes: tuple[int, int]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    bytes: int
    code: Code | None
    error: str = ""

    @property
    def label(self) -> str:
        return f"{self.target} {self.operator} ({self.library}): {self.case}: {self.kernel}"


def as_markdown(rows: Sequence[PeerRow], where: dict[str, str]) -> str:
    """The page: call by call, ours beside the peer's; then one section per target with one table per operator."""
    parts = [f"# Kernels beside flash-linear-attention's, compiled ahead of time ({where['date']})"]
    parts.append(", ".join(f"{name} {value}" for name, value in where.items() if name != "date"))
    parts.append(NOTES.format(version=where["fla-core"]))
    parts.append("## Call by call\n\n" + calls_table(rows))
    for target in (target for target in TARGETS.values() if any(row.target == target.name for row in rows)):
        parts.append(f"## {target.name} ({target.device})")
        of_target = [row for row in rows if row.target == target.name]
        for operator in sorted({row.operator for row in of_target}):
            lines = [_line(row, target) for row in of_target if row.operator == operator]
            parts.append("\n".join([f"**{operator}**\n", HEADER, *lines]))
    return "\n\n".join(parts) + "\n"


def calls_table(rows: Sequence[PeerRow]) -> str:
    """Sums and maxima over the launches of each call that both libraries have; in bold if ours takes more."""
    lines = [
        "| target | operator | case | launches, ours / fla | MB | most registers | spilled, B | most shared, KiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys((row.target, row.operator, row.case) for row in rows):
        of_call = [row for row in rows if (row.target, row.operator, row.case) == key]
        ours, theirs = ([row for row in of_call if row.library == library] for library in ("ours", "fla"))
        if ours and theirs:
            lines.append(f"| {' | '.join(key)} | {' | '.join(_pairs(ours, theirs))} |")
    return "\n".join(lines)


def from_json(row: dict[str, Any]) -> PeerRow:
    code = row["code"]
    ranges = {name: tuple(row[name]) for name in ("registers", "shared_bytes")}
    return PeerRow(**{**row, **ranges, "code": Code(**code) if code else None})


def _pairs(ours: Sequence[PeerRow], theirs: Sequence[PeerRow]) -> list[str]:
    def pair(measure: Any, form: str = ",.0f") -> str:
        a, b = measure(ours), measure(theirs)
        text = f"{a:{form}} / {b:{form}}"
        return f"**{text}**" if a > b else text

    return [
        pair(len),
        pair(lambda rows: sum(row.bytes for row in rows) / 1e6),
        pair(lambda rows: max(row.code.registers for row in rows if row.code)),
        pair(lambda rows: sum(row.code.spilled_bytes for row in rows if row.code)),
        pair(lambda rows: max(row.code.shared_bytes for row in rows if row.code) / 1024, ".1f"),
    ]


def _line(row: PeerRow, target: Target) -> str:
    start = f"| {row.case} | {row.library} | `{row.kernel}` | {row.tried} ({row.spilling}) | "
    start += f"{row.num_warps} x {row.num_stages} | "
    if row.code is None:
        return start + table.failure(row.error) + " |"
    code, fit = row.code, occupancy(row.code, target)
    registers, shared = f"{code.registers}", f"{code.shared_bytes / 1024:.1f}"
    if row.tried > 1:
        least, most = row.shared_bytes
        registers += " ({} .. {})".format(*row.registers)
        shared += f" ({least / 1024:.1f} .. {most / 1024:.1f})"
    cells = [
        registers, code.spilled_bytes, shared, f"{fit.blocks} ({fit.warps})",
        table.instructions(code), f"{row.bytes / 1e6:,.1f}",
    ]  # fmt: skip
    return start + " | ".join(map(str, cells)) + " |"

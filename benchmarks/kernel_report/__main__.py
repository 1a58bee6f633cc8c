"""`python -m benchmarks.kernel_report`: compile every kernel for GPUs that are not here and report the code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from benchmarks.kernel_report import table
from benchmarks.kernel_report.cases import Case, cases, operators
from benchmarks.kernel_report.check import violations
from benchmarks.kernel_report.rows import Row, compile_cases
from benchmarks.kernel_report.targets import TARGETS
from kernels.operator import HAS_TRITON

OUTPUT = Path("benchmarks/kernel_report")
EPILOG = """\
examples (R stands for python -m benchmarks.kernel_report):
  R                                         every operator and target; writes benchmarks/kernel_report/report.md
  R --operator ssd_scan --arch sm_90 --json one operator on one target, as JSON on standard output
  R --check --arch sm_90                    verify only: exit status 1 and a list if a fact is violated
  R --peers                                 flash-linear-attention's kernels at the same sizes; writes peers.md

what --check verifies:
  every kernel compiles; no bytes are spilled on sm_90; a kernel that claims FLOPs has matrix instructions, and none of
  its products runs on scalar units; shared memory stays within a block's limit.

A kernel compiles in 1 to 20 seconds on one core; Triton keeps what it compiled under ~/.triton/cache.
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    problem = _not_possible(options)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if options.peers:
        from benchmarks.kernel_report import peers

        return peers.report(options.arch, options.operator, options.output)
    compiled = [compile_cases(_cases(options, arch), TARGETS[arch], _tell) for arch in options.arch]
    rows = table.in_order(chain.from_iterable(compiled))
    problems = violations(rows)
    if options.json:
        print(table.as_json(rows, table.environment()), end="")
    elif not options.check:
        _write(rows, options.output)
    return _verdict(rows, problems) if options.check else int(any(row.code is None for row in rows))


def _cases(options: argparse.Namespace, arch: str) -> list[Case]:
    return [case for operator in options.operator for case in cases(operator, arch)]


def _write(rows: Sequence[Row], folder: Path) -> None:
    print(table.write(folder, "report", table.as_markdown(rows, table.environment())))


def _verdict(rows: Sequence[Row], problems: Sequence[str]) -> int:
    if not rows:
        print("error: there was nothing to check.", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"- {problem}", file=sys.stderr)
    targets = ", ".join(dict.fromkeys(row.target for row in rows))
    print(f"{len(rows)} kernels compiled for {targets}; facts violated: {len(problems)}.", file=sys.stderr)
    return int(bool(problems))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _not_possible(options: argparse.Namespace) -> str:
    """Obstacle to the report and its remedy; empty if there is none."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 turns the compiler off. Unset it: env -u TRITON_INTERPRET make kernel-report"
    if not HAS_TRITON:
        return "triton is not installed: pip install triton (it comes with torch on Linux)."
    if options.peers and (options.check or options.json):
        return "--peers writes a page of its own; leave out --check and --json."
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
        description="Compile every Triton kernel ahead of time, without a GPU, and report what came out: registers, "
        "spills,\nshared memory, occupancy, matrix instructions, FLOPs, bytes and the roofline time.",
    )
    parser.add_argument("--operator", nargs="+", choices=operators(), default=operators(), help="default: all")
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for report.md or peers.md")
    parser.add_argument("--json", action="store_true", help="print JSON instead of writing files")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a fact below is violated")
    parser.add_argument("--peers", action="store_true", help="other libraries' kernels instead: peers.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())

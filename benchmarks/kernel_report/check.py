"""Facts about the compiled code that must hold; each violation is a sentence with the place and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.kernel_report.rows import Row
from benchmarks.kernel_report.targets import TARGETS

NO_SPILLS = ("sm_90",)  # elsewhere spills are reported, not refused


def violations(rows: Iterable[Row]) -> list[str]:
    """Violated facts, each once: a call may launch the same code several times."""
    return list(dict.fromkeys(f"{row.label}: {problem}" for row in rows for problem in _problems(row)))


def _problems(row: Row) -> Iterator[str]:
    if row.code is None:
        yield f"does not compile.\n    {row.error}"
        return
    code, target = row.code, TARGETS[row.target]
    if code.spilled_bytes and row.target in NO_SPILLS:
        yield (
            f"{code.spilled_bytes} bytes per thread are spilled from {code.registers} registers. Use smaller tiles, or "
            f"more than {row.num_warps} warps, in the first configuration for {row.target}."
        )
    if row.flops and not code.matrix_instructions:
        yield f"claims {row.flops:,} FLOPs but has no matrix instruction."
    if code.scalar_products:
        yield (
            f"{code.scalar_products} matrix products run on scalar units. Give them 16-bit operands and tiles of at "
            "least 16."
        )
    if code.shared_bytes > target.max_shared_bytes:
        yield (
            f"{code.shared_bytes:,} bytes of shared memory; a block of {row.target} can have "
            f"{target.max_shared_bytes:,}. Use fewer stages than {row.num_stages}, or smaller tiles."
        )

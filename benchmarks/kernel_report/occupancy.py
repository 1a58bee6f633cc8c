"""Blocks of a kernel that run on one processor at a time, by the vendors' formulas (sources: targets.py)."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.kernel_report.compiled import Code
from benchmarks.kernel_report.targets import PARTITIONS, Target


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    limited_by: str


def occupancy(code: Code, target: Target) -> Occupancy:
    """Blocks and warps on one processor; 0 if a block asks for more than there is."""
    warps_that_fit = PARTITIONS * (
        target.registers_per_partition // (_round_up(code.registers, target.register_unit) * target.warp_size)
    )
    # NVIDIA hands out registers to as many warps as there are partitions at a time. AMD's limit on blocks is one of
    # barriers, which a block of a single wavefront does not need.
    warps_held = _round_up(code.num_warps, PARTITIONS) if target.backend == "cuda" else code.num_warps
    shared_bytes = _round_up(code.shared_bytes + target.reserved_shared_bytes, target.shared_unit)
    limits = {
        "warps": target.max_warps // code.num_warps,
        "blocks": target.max_blocks if code.num_warps > 1 or target.backend == "cuda" else target.max_warps,
        "registers": warps_that_fit // warps_held if code.registers <= target.max_registers else 0,
        "shared memory": target.shared_bytes // shared_bytes if shared_bytes else target.max_warps,
    }
    if code.tensor_memory_columns:
        limits["tensor memory"] = target.tensor_memory_columns // code.tensor_memory_columns
    if code.shared_bytes > target.max_shared_bytes:
        limits["shared memory"] = 0
    limited_by = min(limits, key=lambda name: limits[name])
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * code.num_warps, limited_by)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

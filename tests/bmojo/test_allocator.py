"""Blocks that a step frees are there for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK_BYTES = 48 << 20  # above the size that glibc maps and unmaps each time
SCRIPT = f"""
import resource, torch
from bmojo.allocator import keep_freed_memory
if KEEP:
    assert keep_freed_memory()
for _ in range(10):  # the heap grows until it has a place for the block
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty({BLOCK_BYTES}, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize("keep", [False, True])
def test_a_block_asked_for_again_costs_no_page_faults(keep):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("KEEP", str(keep))], capture_output=True, text=True, check=True
    )
    faults, pages = int(done.stdout), BLOCK_BYTES // 4096
    assert faults < pages // 10 if keep else faults > pages // 10

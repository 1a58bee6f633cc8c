"""A launch compiled for a target, and the resources its code takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernel_report.targets import Target
from kernels.gpu.launch import Launch

# Instructions that multiply matrices, as they are written in PTX and in AMD's assembly.
MATRIX_INSTRUCTIONS = {
    "cuda": re.compile(r"^\s*(?:@!?%\w+\s+)?(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", re.MULTILINE),
    "hip": re.compile(r"^\s*(v_mfma)_", re.MULTILINE),
}
# A product that Triton left in the layout of plain arithmetic is a loop of scalar multiplications.
SCALAR_PRODUCT = re.compile(r"= tt\.dot .*-> tensor<[^>]*, #blocked\d*>")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Code:
    """Resources of one kernel.

    registers: 32-bit, per thread; on AMD vector registers, accumulators included.
    spilled_bytes: registers that went to memory, per thread.  stack_bytes: all its memory, spills included.
    shared_bytes, tensor_memory_columns: per block.
    matrix_instructions: how often each is written in the code, not how often it runs.
    scalar_products: matrix products that got none.
    """

    num_warps: int
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    matrix_instructions: dict[str, int]
    scalar_products: int


def compile_launch(launch: Launch, target: Target) -> Code:
    """Compile a launch. Raises: whatever Triton or ptxas raises for a kernel they cannot compile."""
    kernel = launch.compile(target.triton_target())
    assembly = kernel.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, spilled_bytes, stack_bytes = (
        _ptxas(assembly, target) if target.backend == "cuda" else amd_registers(assembly)
    )
    return Code(
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled_bytes,
        stack_bytes=stack_bytes,
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        matrix_instructions=matrix_instructions(assembly, target.backend),
        scalar_products=len(SCALAR_PRODUCT.findall(kernel.asm["ttgir"])),
    )


def matrix_instructions(assembly: str, backend: str) -> dict[str, int]:
    return dict(Counter(MATRIX_INSTRUCTIONS[backend].findall(assembly)))


def ptxas_registers(log: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack bytes from what `ptxas -v` prints about a kernel."""
    used, spills = REGISTERS.search(log), SPILLS.search(log)
    if used is None or spills is None:
        raise ValueError(f"ptxas -v printed no register count; is this another version of it? It said:\n{log}")
    stack, stores, loads = map(int, spills.groups())
    return int(used[1]), max(stores, loads), stack


def amd_registers(assembly: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack bytes from the kernel's metadata at the end of its assembly."""

    def field(name: str) -> int:
        match = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)$", assembly, re.MULTILINE)
        if match is None:
            raise ValueError(f"the assembly's metadata has no .{name}; is this another version of Triton?")
        return int(match[1])

    return field("vgpr_count"), 4 * field("vgpr_spill_count"), field("private_segment_fixed_size")


def _ptxas(ptx: str, target: Target) -> tuple[int, int, int]:
    """Assemble again as Triton did, for the log that it discards."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        options = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={gpu_name(target)}"]
        command = [ptxas_tool(target).path, *options, str(source), "-o", str(Path(folder, "kernel.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel:\n{done.stderr}")
    return ptxas_registers(done.stderr + done.stdout)


def ptxas_tool(target: Target) -> Any:
    """The wheel's own assembler for a target: path and version."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(target.arch)


def gpu_name(target: Target) -> str:
    """sm_90 and later are compiled with the instructions that only they have: sm_90a."""
    from triton.backends.nvidia.compiler import sm_arch_from_capability

    return str(sm_arch_from_capability(target.arch))

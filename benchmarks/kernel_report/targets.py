"""Architectures that kernels are compiled for: limits of a processor and peaks of a device.

A processor is a streaming multiprocessor (SM) of NVIDIA or a compute unit (CU) of AMD; a warp is AMD's wavefront. Its
register file is in four partitions, each serving the warps that one scheduler runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PARTITIONS = 4
KIB = 1024


@dataclass(frozen=True)
class Target:
    """An architecture, and the device its rooflines are of.

    registers_per_partition: 32-bit registers of single threads.  register_unit: a thread's are rounded up to this.
    max_shared_bytes: of one block.  reserved_shared_bytes: taken from the processor by every block besides its own.
    tensor_memory_columns: of the memory that tcgen05 accumulates in; 0 if there is none.
    peak_flops: dense bfloat16 matrix products with float32 sums, per second.
    peak_bytes: from device memory, per second.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    max_warps: int
    max_blocks: int
    registers_per_partition: int
    register_unit: int
    max_registers: int
    shared_bytes: int
    max_shared_bytes: int
    reserved_shared_bytes: int
    shared_unit: int
    tensor_memory_columns: int
    device: str
    processors: int
    peak_flops: float
    peak_bytes: float
    limits_source: str
    peaks_source: str

    def roofline_s(self, flops: int, num_bytes: int) -> float:
        """The least time a call can take: its matrix products at their peak, or its traffic, whichever is longer."""
        return max(flops / self.peak_flops, num_bytes / self.peak_bytes)

    def triton_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)


_CUDA = "CUDA programming guide, compute capabilities (docs.nvidia.com/cuda/cuda-programming-guide)"

_TARGETS = (
    Target(
        name="sm_80", backend="cuda", arch=80, warp_size=32,
        max_warps=64, max_blocks=32, registers_per_partition=16384, register_unit=8, max_registers=255,
        shared_bytes=164 * KIB, max_shared_bytes=163 * KIB, reserved_shared_bytes=KIB, shared_unit=128,
        tensor_memory_columns=0,
        device="A100 SXM 80 GB", processors=108, peak_flops=312e12, peak_bytes=2.039e12,
        limits_source=_CUDA, peaks_source="NVIDIA A100 data sheet (2021)",
    ),
    Target(
        name="sm_90", backend="cuda", arch=90, warp_size=32,
        max_warps=64, max_blocks=32, registers_per_partition=16384, register_unit=8, max_registers=255,
        shared_bytes=228 * KIB, max_shared_bytes=227 * KIB, reserved_shared_bytes=KIB, shared_unit=128,
        tensor_memory_columns=0,
        device="H100 SXM", processors=132, peak_flops=989.4e12, peak_bytes=3.35e12,
        limits_source=_CUDA, peaks_source="NVIDIA H100 architecture white paper and data sheet (2023)",
    ),
    Target(
        name="sm_100", backend="cuda", arch=100, warp_size=32,
        max_warps=64, max_blocks=32, registers_per_partition=16384, register_unit=8, max_registers=255,
        shared_bytes=228 * KIB, max_shared_bytes=227 * KIB, reserved_shared_bytes=KIB, shared_unit=128,
        tensor_memory_columns=512,
        device="B200 (HGX)", processors=148, peak_flops=2.25e15, peak_bytes=8e12,
        limits_source=_CUDA + "; tensor memory: PTX ISA, tcgen05",
        peaks_source="NVIDIA Blackwell data sheet (2024): HGX B200, an eighth, without sparsity",
    ),
    Target(
        name="gfx942", backend="hip", arch="gfx942", warp_size=64,
        max_warps=32, max_blocks=16, registers_per_partition=32768, register_unit=8, max_registers=512,
        shared_bytes=64 * KIB, max_shared_bytes=64 * KIB, reserved_shared_bytes=0, shared_unit=512,
        tensor_memory_columns=0,
        device="MI300X", processors=304, peak_flops=1307.4e12, peak_bytes=5.3e12,
        limits_source="AMD CDNA 3 ISA; LLVM AMDGPUBaseInfo.cpp (8 waves a SIMD, 16 barriers a CU)",
        peaks_source="AMD Instinct MI300X data sheet (2023)",
    ),
)  # fmt: skip

TARGETS = {target.name: target for target in _TARGETS}

"""What is known of GPUs by their names: memory, peak, links. The one table of its kind (train/device.py reads it)."""

from __future__ import annotations

import re
from dataclasses import dataclass

GPUS_PER_NODE = 8  # of the machines that the data sheets describe
_GB = 10**9
TRAINIUM_2 = "trn2"


@dataclass(frozen=True)
class Hardware:
    """A GPU as its data sheet describes it.

    memory_bytes: in powers of ten. The device itself reports a few percent more, which CUDA's context (about 0.5 GB)
        and the driver take; so this is what training can have.
    bf16_flops: dense peak of matrix products in bfloat16, per second; None: no public figure was found.
    intra_node_bytes_per_s: in one direction, from one GPU to the others of its machine.
    inter_node_bytes_per_s: in one direction, per GPU, to another machine.
    """

    name: str
    words: tuple[str, ...]
    memory_bytes: int
    bf16_flops: float | None
    intra_node_bytes_per_s: float
    inter_node_bytes_per_s: float


def _gpu(
    name: str, words: str, memory_gb: float, bf16_tflops: float | None, intra_gb_per_s: float, inter_gb_per_s: float
) -> Hardware:
    flops = None if bf16_tflops is None else bf16_tflops * 1e12
    return Hardware(name, tuple(words.split()), int(memory_gb * _GB), flops, intra_gb_per_s * _GB, inter_gb_per_s * _GB)


# A variant comes before its family: the first entry whose words are all in a device's name is the one.
# Sources: data sheets of NVIDIA (A100, L4, L40S, H100, GH200, H200, HGX B200, GB200) and AMD (MI300X). Links within a
# machine: half of NVLink's or Infinity Fabric's total of both directions, else PCIe's. Between machines: the network
# adapters of a DGX of that generation (200 Gb/s per GPU for A100, 400 for H100 to B200), of others 100 Gb/s per GPU.
# trn2 is one logical core of the default configuration (two physical ones; 64 in the largest instance) by AWS's
# documentation of Trainium 2. Of its links only the network's is documented per core: 32 GB/s stands for the others.
HARDWARE: tuple[Hardware, ...] = (
    _gpu("gb200", "GB200", 186, 2500, 900, 50),
    _gpu("b200", "B200", 180, 2250, 900, 50),
    _gpu("h200-nvl", "H200 NVL", 141, None, 450, 50),
    _gpu("h200", "H200", 141, 989, 450, 50),
    _gpu("gh200", "GH200", 96, 989, 450, 50),
    _gpu("h100-nvl", "H100 NVL", 94, 835, 300, 50),
    _gpu("h100-pcie", "H100 PCIe", 80, 756, 64, 25),
    _gpu("h100", "H100", 80, 989, 450, 50),
    _gpu("a100-40gb", "A100 40GB", 40, 312, 300, 25),
    _gpu("a100", "A100", 80, 312, 300, 25),
    _gpu("mi300x", "MI300X", 192, 1307, 448, 50),
    _gpu("l40s", "L40S", 48, 362, 32, 12.5),
    _gpu("l4", "L4", 24, 121, 32, 12.5),
    _gpu(TRAINIUM_2, "logical NeuronCore", 24, 158, 32, 6.25),
)
NAMES = tuple(sorted(hardware.name for hardware in HARDWARE))


def named(name: str) -> Hardware:
    """An entry by its name. Raises: ValueError: there is none; names those that there are."""
    for hardware in HARDWARE:
        if hardware.name == name.lower():
            return hardware
    raise ValueError(f"hardware {name!r} is not known. Known: {', '.join(NAMES)}.")


def of_device(device_name: str) -> Hardware | None:
    """The entry of a device by the name that its driver gives it: `NVIDIA H100 80GB HBM3`."""
    words = set(re.split(r"[\s-]+", device_name))
    return next((hardware for hardware in HARDWARE if words.issuperset(hardware.words)), None)


def known_peak(device_name: str) -> float | None:
    """bfloat16 peak of a GPU by its device's name, in FLOP/s; None where it is not known."""
    hardware = of_device(device_name)
    return None if hardware is None else hardware.bf16_flops


def expected_mfu(d_model: int) -> float:
    """Share of the data sheet's peak that training reaches by our own measurements.

    B'MOJO of 116M (d_model 768) had 339 TFLOP/s on an H200, 34 % of 989, and of 370M (d_model 1024) 392, 40 %
    (benchmarks/train_step_gpu_2026-11-27.md). Nothing larger and no other GPU was measured.
    """
    return 0.34 if d_model < 1024 else 0.40

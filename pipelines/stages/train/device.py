"""Every question about the device that training, evaluation and the command line compute on.

No other module of pipelines/ asks `torch.cuda` (tested): another kind of accelerator is added here, as NeuronCores are
by pipelines/neuron/runtime.py.
"""

from __future__ import annotations

import logging
import math
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist

from base.errors import UserError
from pipelines.engine.provenance import machine
from pipelines.neuron import runtime as neuron
from pipelines.stages.train.planning.hardware import TRAINIUM_2, known_peak, named

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

_MEASURE_S = 0.4
_SIDES = {"cpu": 768, neuron.TYPE: 2048}
"""Of the matrices whose product measures a peak; a GPU's are larger."""
_MEGABYTE = 1e6
_MOST_ALLOCATIONS = 200_000  # in a snapshot of the memory


def gpu_names() -> list[str]:
    """Names of the GPUs that this process can use."""
    return [torch.cuda.get_device_name(index) for index in range(num_gpus())]


def num_gpus() -> int:
    """How many GPUs this process can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pick(on_gpu: bool) -> torch.device:
    """The device of a process that has at most one GPU."""
    return torch.device("cuda") if on_gpu else CPU


def exact_device(device: torch.device) -> torch.device:
    """Where numbers of 64 bits are what they are: NeuronCores have none, so it is the host beside them."""
    return CPU if device.type == neuron.TYPE else device


def name_of(device: torch.device) -> str:
    """The GPU's name; of the CPU its model and cores."""
    if device.type == "cpu":
        return machine()["cpu"]
    if device.type == neuron.TYPE:
        return f"logical NeuronCore (torch-neuronx {neuron.version()})"
    name: str = torch.get_device_module(device).get_device_name(device)
    return name


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


def pick_in_worker(on_gpu: bool) -> torch.device:
    """The device that Ray Train gave to this worker."""
    if not on_gpu:
        return CPU
    from ray.train.torch import get_device  # two seconds, which only workers on GPUs need to wait

    device: torch.device = get_device()
    return device


def seed_everything(seed: int) -> None:
    """Seed every random generator of this process, those of its devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of Python's, NumPy's, torch's and, unless it is the CPU, the device's generators.

    As tensors, so that a checkpoint holds no pickle.
    """
    _, python_words, python_gauss = random.getstate()
    _, numpy_keys, numpy_position, has_gauss, numpy_gauss = np.random.get_state()
    states = {
        "python": torch.tensor(python_words, dtype=torch.int64),
        "python_gauss": torch.tensor([python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(numpy_keys, dtype=np.int64)),
        "numpy_position": torch.tensor([numpy_position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == neuron.TYPE:
        own = neuron.rng_state()
        return states if own is None else states | {device.type: own}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `rng_state` took; another kind of device keeps its own state."""
    has_gauss, gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss if has_gauss else None))
    position, numpy_has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, numpy_has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if device.type == neuron.TYPE and device.type in states:
        neuron.set_rng_state(states[device.type])
    elif device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16 inside it, if asked. Weights are cast once in it, so keep it over many calls."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def has_graphs(device: torch.device) -> bool:
    """Whether launches can be captured in graphs there and replayed."""
    return device.type == "cuda" and not torch.version.hip


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the host on the device; the host does not wait for the copy."""
    if device.type == neuron.TYPE:
        return tensor.contiguous().to(device)
    if device.type != "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # from other memory the driver copies only when the device has done its work
    return tensor.to(device, non_blocking=True)


def host_memory(device: torch.device, numel: int) -> torch.Tensor:
    """float32 memory of the host, to which a GPU copies without waiting. Give it to release_host_memory in the end.

    It is registered with CUDA, because torch's own pinned memory takes the next power of two.
    """
    memory = torch.empty(numel)
    if device.type == "cuda" and numel:
        memory.zero_()  # has its pages made by all threads; registering makes them one after the other
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error) != 0:
            raise RuntimeError(
                f"CUDA could not pin {memory.nbytes / 2**30:.1f} GiB of host memory for checkpoints (its error "
                f"{int(error)}). Each worker needs that much: `bmojo plan` says how much in all."
            )
    return memory


def release_host_memory(device: torch.device, memory: torch.Tensor) -> None:
    """Memory of host_memory is about to be freed."""
    if device.type == "cuda" and memory.numel():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == neuron.TYPE:
        neuron.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def has_events(device: torch.device) -> bool:
    """Whether the device can tell when it has come how far; else the host's clock says what it waited for."""
    return device.type not in ("cpu", neuron.TYPE)


def timed_event(device: torch.device) -> torch.Event:
    """A mark in the device's work, whose time can be read when it has come so far."""
    event: torch.Event = torch.get_device_module(device).Event(enable_timing=True)
    return event


def usage_of(device: torch.device) -> dict[str, float]:
    """What this process uses, by the names of the metrics: memory, and how busy the device is."""
    if device.type == "cpu":
        process = _this_process()
        return {
            "memory_rss_megabytes": process.memory_info().rss / _MEGABYTE,
            "cpu_percentage": process.cpu_percent(),  # of one core, since the last call
        }
    if device.type == neuron.TYPE:
        now, most = neuron.memory_allocated()
        return {
            "neuron_memory_allocated_megabytes": now / _MEGABYTE,
            "neuron_memory_peak_megabytes": most / _MEGABYTE,
        }
    module = torch.get_device_module(device)
    values = {
        "gpu_memory_allocated_megabytes": module.memory_allocated(device) / _MEGABYTE,
        "gpu_memory_reserved_megabytes": module.memory_reserved(device) / _MEGABYTE,
        "gpu_memory_peak_megabytes": module.max_memory_allocated(device) / _MEGABYTE,
    }
    try:
        return values | {
            "gpu_utilization_percentage": float(module.utilization(device)),
            "gpu_power_usage_watts": module.power_draw(device) / 1e3,
            "gpu_temperature_celsius": float(module.temperature(device)),
        }
    except Exception as error:  # NVML's own kinds, which cannot be named where it is missing
        _tell_of_missing_usage(f"{type(error).__name__}: {error}")
        return values


@cache
def _this_process() -> psutil.Process:
    process = psutil.Process()
    process.cpu_percent()  # the first call only starts the interval
    return process


@cache
def _tell_of_missing_usage(problem: str) -> None:
    logger.warning(
        "Utilisation, power and temperature of the GPU are left out (%s). They need nvidia-ml-py: "
        "pip install -c constraints.txt -e '.[gpu]'.", problem,
    )  # fmt: skip


def profiled(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    """What a profile of work on the device records."""
    on_gpu = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [torch.profiler.ProfilerActivity.CPU, *on_gpu]


def record_memory(device: torch.device) -> None:
    """From now on remember who allocates memory on the GPU; the CPU's is in a profile anyway."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS, device=device)


def write_memory(device: torch.device, path: Path) -> None:
    """Write what was recorded, and stop recording."""
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None, device=device)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: allocated on the GPU; on the CPU resident (the kernel's VmHWM)."""
    if device.type == neuron.TYPE:
        return neuron.memory_allocated()[1]
    if device.type != "cpu":
        allocated: int = torch.get_device_module(device).max_memory_allocated(device)
        return allocated
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_size(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cpu":
        return psutil.virtual_memory().total
    if device.type == neuron.TYPE:
        return named(TRAINIUM_2).memory_bytes
    size: int = torch.get_device_module(device).get_device_properties(device).total_memory
    return size


@contextmanager
def explained_memory(remedy: str) -> Iterator[None]:
    """Turn the error of a device without free memory into a UserError that ends with `remedy`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"A GPU ran out of memory: {str(error).splitlines()[0]} {remedy}") from error


class Peaks(NamedTuple):
    """Matrix-product FLOP/s of all workers together.

    data_sheet: in bfloat16, of the GPU by its name; None in float32, on a CPU, and where it is not known.
    measured: at the start of training, in its precision.
    is_by_data_sheet: the MFU is a share of the former.
    """

    data_sheet: float | None
    measured: float
    is_by_data_sheet: bool

    @property
    def of_mfu(self) -> float | None:
        """What the MFU is a share of; None where that is not known."""
        return self.data_sheet if self.is_by_data_sheet else self.measured


def peaks(device: torch.device, autocast_bf16: bool) -> Peaks:
    """The peaks of all workers together. A collective.

    Measured are products on every rank at the same time, with the threads that training has, so that shared memory
    bandwidth and clocks count. A CPU is measured in float32, in which its operators compute.
    """
    is_by_data_sheet = device.type != "cpu" and autocast_bf16
    dist.barrier()
    dtype = torch.bfloat16 if is_by_data_sheet else torch.float32
    size = _SIDES.get(device.type, 8192)
    measured = measure_peak(device, size=size, duration_s=_MEASURE_S, dtype=dtype)
    known = known_peak(name_of(device)) if is_by_data_sheet else None
    if is_by_data_sheet and known is None and dist.get_rank() == 0:
        logger.warning(
            "MFU is given by the measured peak alone: the bfloat16 peak of %s is not in the table of %s. Add it there, "
            "from its data sheet.",
            name_of(device), known_peak.__module__,
        )  # fmt: skip
    both = [float("nan") if known is None else known, measured]
    total = torch.tensor(both, dtype=torch.float64, device=exact_device(device))
    dist.all_reduce(total)
    of_data_sheets, of_measurements = total.tolist()
    return Peaks(None if math.isnan(of_data_sheets) else of_data_sheets, of_measurements, is_by_data_sheet)


def measure_peak(device: torch.device, size: int, duration_s: float, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of products of square matrices: the best of what fits into the duration."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best_s = float("inf")
    end = time.perf_counter() + duration_s
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return float(2 * size**3 / best_s)

"""What this machine is like, measured once and kept: a core's peak, and what a worker's process takes by itself."""

from __future__ import annotations

import torch
from pydantic import Field

from base.config import StrictConfig
from bmojo.fields import ActivationCheckpointing
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU, measure_peak
from pipelines.stages.train.planning.activations import activations
from pipelines.stages.train.planning.cache import keep, recall
from pipelines.stages.train.planning.probe import measure
from pipelines.stages.train.planning.states import model_size

MOST_CORE_FLOPS = 1e14  # no core is as fast; a cached figure above it is damaged
_FIRST_TRIES = 5


class CorePeak(StrictConfig):
    """float32 matrix-product FLOP/s of one core."""

    flops: float = Field(ge=0, lt=MOST_CORE_FLOPS)


class ProcessMemory(StrictConfig):
    """Resident memory of a worker on the CPU, beside what its tensors take."""

    base_bytes: int = Field(ge=0, description="Libraries, thread pools, code that has run.")
    per_activation_byte: float = Field(ge=0, description="Heap per byte of activations: holes between blocks count.")


def core_peak() -> float:
    """float32 matrix-product FLOP/s of one core of this machine: the best ever measured here.

    A busy machine measures too little, never too much. So the best is kept in the cache folder, and an estimate depends
    on the machine rather than on the moment. Once it is known it is not measured again: ten plans say the same.
    """
    known = recall("core-peak", CorePeak)
    if known is not None and known.flops > 0:
        return known.flops
    best = max(measure_core_peak() for _ in range(_FIRST_TRIES))
    keep("core-peak", CorePeak(flops=best))
    return best


def measure_core_peak() -> float:
    """float32 matrix-product FLOP/s of one core: the best of a twentieth of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_peak(CPU, size=512, duration_s=0.05)
    finally:
        torch.set_num_threads(threads)


def process_memory(checkpointing: ActivationCheckpointing = "none", measure_again: bool = False) -> ProcessMemory:
    """A worker's own memory on this machine: kept from the first call, which starts a worker (10 s on an idle machine).

    Real steps of a small model are taken with two sizes of batch: what grows with the activations is the heap's share,
    the rest is the process's own.

    Args: checkpointing: which parts are computed again. What is kept then lies between what is not, so there are more
        holes: 1.2 to 1.4 bytes per byte with none, 1.8 to 2.0 with whole blocks.
    """
    name = f"process-memory-{checkpointing}"
    known = None if measure_again else recall(name, ProcessMemory)
    if known is not None:
        return known
    train, seq_len = _small_training(checkpointing), 512
    steps = measure(train, seq_len, first_rows=2)
    rows = 2, train.micro_batch_size
    few, many = (activations(train.model, number, seq_len, "cpu", False, checkpointing).peak for number in rows)
    share = max(1.0, (steps.peak_bytes - steps.first_peak_bytes) / (many - few))
    states = train.backend.states(model_size(train), 1, on_gpu=False, accumulates=False).fixed
    found = ProcessMemory(base_bytes=max(0, int(steps.peak_bytes - states - share * many)), per_activation_byte=share)
    keep(name, found)
    return found


def _small_training(checkpointing: ActivationCheckpointing) -> TrainStageConfig:
    return TrainStageConfig.model_validate(
        {
            "kind": "train",
            "model": {
                "pattern": "bmojo*2", "d_model": 192, "num_heads": 3, "window_size": 128, "chunk_size": 64,
                "num_eidetic": 32, "vocab_size": 1024,
            },
            "global_batch_size": 16, "micro_batch_size": 16, "max_steps": 2, "warmup_steps": 1,
            "backend": {"kind": "deepspeed", "zero_stage": 0}, "activation_checkpointing": checkpointing,
        }
    )  # fmt: skip

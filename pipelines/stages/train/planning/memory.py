"""Memory of a training worker, part by part, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.shapes_only import Device
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.planning.activations import activations
from pipelines.stages.train.planning.calibration import ProcessMemory
from pipelines.stages.train.planning.states import model_size

GPU_SLACK = 0.12  # of activations: holes, workspaces; by what was measured on H200s (docs/design/0029)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per worker: what is there all the time, and at the worst moment of a step beside it."""

    process: int
    """Libraries and thread pools; on a GPU 0, because hardware.memory_bytes leaves out CUDA's context."""
    parameters: int
    optimizer: int
    buckets: int
    activations: int
    """Of a micro batch, at most, the loss included."""
    gradients: int
    """With what an update needs beside them, as far as they are there together with the activations."""
    slack: int
    checkpoint_copy: int
    """In the host's memory, from the first checkpoint on."""
    offloaded: int
    """In the host's memory."""
    on_accelerator: bool

    @property
    def peak(self) -> int:
        """At most, on the worker's device, in steps."""
        return (
            self.process + self.parameters + self.optimizer + self.buckets + self.activations + self.gradients
            + self.slack
        )  # fmt: skip

    @property
    def least(self) -> int:
        """What the tensors alone take: a device with less cannot run a step."""
        return self.peak - self.process - self.slack

    @property
    def device(self) -> int:
        """At most, on the worker's device, with the copy of a checkpoint if that lies there too."""
        return self.peak if self.on_accelerator else self.peak + self.checkpoint_copy


def plan_memory(train: TrainStageConfig, seq_len: int, process: ProcessMemory | None) -> MemoryPlan:
    """Memory per worker. Args: train: whose model has a vocab_size. process: this machine's; None: left out."""
    model = model_size(train)
    num_workers = train.resources.num_workers
    accumulates = train.accumulation_steps > 1
    states = train.backend.states(model, num_workers, train.on_gpu, accumulates)
    acts = activations(
        train.model, train.worker_micro_batch_size, seq_len, _device(train), train.autocast_bf16,
        train.activation_checkpointing, train.trains_in_float8,
    )  # fmt: skip
    beside = states.beside(acts)
    slack = GPU_SLACK if train.on_accelerator else (process.per_activation_byte - 1 if process is not None else 0.0)
    return MemoryPlan(
        process=0 if train.on_accelerator or process is None else process.base_bytes,
        parameters=states.parameters,
        optimizer=states.optimizer,
        buckets=states.buckets,
        activations=min(acts.peak, beside),
        gradients=max(0, beside - acts.peak),
        slack=int(slack * acts.peak),
        checkpoint_copy=model.checkpoint_bytes // num_workers,
        offloaded=states.host,
        on_accelerator=train.on_accelerator,
    )


def _device(train: TrainStageConfig) -> Device:
    """Along whose operators' paths activations are counted."""
    return "gpu" if train.on_gpu else "neuron" if train.on_neuron else "cpu"


def largest_micro_batch(train: TrainStageConfig, seq_len: int, process: ProcessMemory | None, room: int) -> int | None:
    """The largest micro batch of a worker's share that fits into `room` bytes; None: not one sequence does.

    Searched by halving between the two that were tried: memory grows with the micro batch.
    """
    share = train.worker_batch_size
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        tried = train.model_copy(update={"micro_batch_size": sizes[middle]})
        if plan_memory(tried, seq_len, process).device <= room:
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None

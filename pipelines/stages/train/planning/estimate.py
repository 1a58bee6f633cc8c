"""What `bmojo plan` says of train stages: memory, disk, tokens, FLOPs, time and cost, and what fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bmojo.counting import count
from bmojo.fields import ActivationCheckpointing
from kernels.operator import HAS_TRITON
from pipelines.engine.stage import Estimate, Machines, StageNode
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.planning.calibration import ProcessMemory, core_peak, process_memory
from pipelines.stages.train.planning.fitting import hardware_of, on_gpus, room_of, sized_training
from pipelines.stages.train.planning.hardware import GPUS_PER_NODE, Hardware
from pipelines.stages.train.planning.memory import MemoryPlan, largest_micro_batch, plan_memory
from pipelines.stages.train.planning.probe import measure
from pipelines.stages.train.planning.speed import SpeedPlan, plan_speed, remember
from pipelines.stages.train.planning.states import model_size
from pipelines.stages.train.planning.words import in_words, number, size
from pipelines.stages.train.stage import TrainStage

_MOST_ROWS = 6  # worker counts of a stage whose fitting micro batches are listed


@dataclass(frozen=True)
class TrainPlan:
    """One train stage."""

    name: str
    train: TrainStageConfig  # the model with a vocab_size
    seq_len: int
    num_params: int
    num_tokens: int
    train_flops: float
    num_steps: int
    memory: MemoryPlan
    speed: SpeedPlan
    hardware: Hardware | None

    @property
    def time_s(self) -> float:
        """Of all optimizer steps."""
        return self.speed.step_s * self.num_steps

    @property
    def disk_bytes(self) -> int:
        """Checkpoints that are kept, one that is being written, and the model."""
        checkpoint = model_size(self.train).checkpoint_bytes
        kept = min(self.train.keep_checkpoints, -(-self.num_steps // self.train.checkpoint_every_steps)) + 1
        if self.train.keep_every_steps is not None:
            kept += self.num_steps // self.train.keep_every_steps
        return kept * checkpoint + 4 * self.num_params

    @property
    def shard_bytes(self) -> int:
        """Of tokens that are read once."""
        vocab_size = self.train.model.vocab_size or 0
        return self.num_tokens * (2 if vocab_size <= 1 << 16 else 4)


def plan_training(node: StageNode[TrainStage], machines: Machines, process: ProcessMemory | None) -> TrainPlan:
    """Plan a train stage whose tokenizer may not exist yet: its vocabulary is taken to have the size asked for.

    Memory is that of the smallest group of workers that may train, time that of the largest.

    Raises: UserError: machines.hardware is not known.
    """
    train, seq_len = sized_training(node)
    hardware = hardware_of(machines, train)
    if hardware is not None:
        train = on_gpus(train)
    counts = count(train.model, seq_len)
    num_steps = train.num_steps(seq_len)
    num_tokens = train.num_samples(num_steps) * seq_len
    if machines.measure and hardware is None:
        remember(train, seq_len, measure(train, seq_len), "plan --measure")
    return TrainPlan(
        name=node.name,
        train=train,
        seq_len=seq_len,
        num_params=counts.num_params,
        num_tokens=num_tokens,
        train_flops=counts.train_flops_per_token * num_tokens,
        num_steps=num_steps,
        memory=plan_memory(train.with_workers(train.group_sizes[0]), seq_len, process),
        speed=plan_speed(train, seq_len, hardware, core_peak(), machines.num_cores),
        hardware=hardware,
    )


def estimate_all(stages: Sequence[StageNode[TrainStage]], machines: Machines) -> list[Estimate]:
    """The train stages of a pipeline: what they cost, their memory part by part, and what would fit.

    Raises: UserError: machines.hardware is not known, or steps that were to be measured failed.
    """
    here = [node.config for node in stages if machines.hardware is None and not node.config.on_accelerator]
    processes = {
        part: process_memory(part, machines.measure)
        for part in dict.fromkeys(train.activation_checkpointing for train in here)
    }
    plans = [plan_training(node, machines, processes.get(node.config.activation_checkpointing)) for node in stages]
    return [_costs(plans, machines), _memory(plans), *_fits(plans, processes)]


def _costs(plans: Sequence[TrainPlan], machines: Machines) -> Estimate:
    columns = ["train stage", "parameters", "tokens", "FLOPs", "memory a worker", "disk", "step", "time"]
    priced = machines.price_per_hour is not None
    rows = []
    for plan in plans:
        row = [
            plan.name, number(plan.num_params), number(plan.num_tokens), f"{plan.train_flops:.2e}",
            size(plan.memory.device), size(plan.disk_bytes), _step(plan.speed.step_s), f"about {in_words(plan.time_s)}",
        ]  # fmt: skip
        if machines.price_per_hour is not None:
            row.append(f"{cost(plan, machines.price_per_hour):,.2f}")
        rows.append(row)
    total_s = sum(plan.time_s for plan in plans)
    notes = [f"All training: about {in_words(total_s)} in optimizer steps. Validation and other stages do not count."]
    if machines.price_per_hour is not None:
        total = sum(cost(plan, machines.price_per_hour) for plan in plans)
        notes[0] += f" All of it costs {total:,.2f} at {machines.price_per_hour:g} per worker and hour."
    sources = {plan.speed.source: plan.speed.is_measured for plan in plans}
    notes.append(f"Time: {'; '.join(sources)}.")
    if not all(sources.values()) and machines.hardware is None:
        notes.append("`bmojo plan --measure` takes real steps and keeps what they took.")
    notes += [_elastic(plan) for plan in plans if len(plan.train.group_sizes) > 1]
    notes.append("Disk: checkpoints that are kept, one being written, and the model.")
    return Estimate(columns=(*columns, "cost") if priced else columns, rows=rows, notes=notes)


def _elastic(plan: TrainPlan) -> str:
    *others, most = plan.train.group_sizes
    fewer = ", ".join(map(str, others))
    return f"{plan.name} trains on {fewer} or {most} workers: time is that of {most}, memory that of {others[0]}."


def cost(plan: TrainPlan, price_per_hour: float) -> float:
    """Of the workers' devices while training. Args: price_per_hour: of one device."""
    return plan.time_s / 3600 * plan.train.resources.num_workers * price_per_hour


def _step(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.0f} ms"


def _memory(plans: Sequence[TrainPlan]) -> Estimate:
    rows = []
    for plan in plans:
        memory = plan.memory
        rows.append(
            [
                plan.name, str(plan.train.group_sizes[0]), size(memory.process), size(memory.parameters),
                size(memory.optimizer), size(memory.gradients), size(memory.buckets), size(memory.activations),
                size(memory.slack), size(memory.peak), size(memory.checkpoint_copy + memory.offloaded),
            ]
        )  # fmt: skip
    columns = (
        "memory a worker", "workers", "process", "parameters", "optimizer", "gradients", "buckets", "activations",
        "slack", "in steps", "host: checkpoint",
    )  # fmt: skip
    kinds = {"GPU" if plan.train.on_gpu else "CPU" for plan in plans}
    path = "Triton" if HAS_TRITON else "plain torch, because triton is not installed here"
    notes = ["Activations: of the model's own forward and backward, on tensors without memory."]
    if "GPU" in kinds:
        notes[0] += f" On a GPU along the kernels' paths there ({path})."
    if any(plan.train.on_neuron for plan in plans):
        notes.append(
            "Nothing was measured on NeuronCores: their memory, along the static path, and times are arithmetic "
            "(docs/neuron.md)."
        )
    return Estimate(columns=columns, rows=rows, notes=notes)


def _fits(plans: Sequence[TrainPlan], processes: Mapping[ActivationCheckpointing, ProcessMemory]) -> list[Estimate]:
    """Which worker counts and micro batches fit; nothing where the memory is not known."""
    rows = []
    for plan in plans:
        process = processes.get(plan.train.activation_checkpointing)
        for num_workers in worker_counts(plan.train):
            train = plan.train.with_workers(num_workers)
            room = room_of(train, plan.hardware)
            if room is None:
                continue
            fitting = largest_micro_batch(train, plan.seq_len, process, room)
            asked = plan_memory(train, plan.seq_len, process)
            verdict = "fits" if asked.device <= room else "does not fit"
            rows.append(
                [
                    plan.name, str(num_workers), f"{asked.device / room:.0%} of {size(room)}",
                    f"{train.worker_micro_batch_size}: {verdict}", "none" if fitting is None else str(fitting),
                ]
            )  # fmt: skip
    if not rows:
        return []
    columns = ("what fits", "workers", "memory a worker", "micro batch", "largest that fits")
    return [Estimate(columns=columns, rows=rows, notes=())]


def worker_counts(train: TrainStageConfig) -> list[int]:
    """Counts that divide the global batch: as configured, halved and doubled a few times, by whole machines."""
    asked = train.resources.num_workers
    near = {*train.group_sizes[-2:], asked, asked // 4, asked // 2, 2 * asked, 4 * asked}
    if train.on_gpu:
        near.add(GPUS_PER_NODE)
    return sorted(n for n in near if n > 0 and train.global_batch_size % n == 0)[:_MOST_ROWS]

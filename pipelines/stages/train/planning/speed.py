"""Seconds of an optimizer step: measured on this machine if it was, else from FLOPs, peaks and links."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pydantic import Field

from base.config import StrictConfig
from bmojo.counting import ModelCounts, count
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.planning.cache import digest, keep, recall
from pipelines.stages.train.planning.hardware import GPUS_PER_NODE, Hardware, expected_mfu
from pipelines.stages.train.planning.steps import Steps
from pipelines.stages.train.planning.words import in_words

CPU_SHARE = 0.35  # of the cores' matrix-product peak, where nothing was measured
LINK_SHARE = 0.8  # of a link's rate that collectives reach


@dataclass(frozen=True)
class SpeedPlan:
    """Seconds of an optimizer step, and where the figure comes from."""

    step_s: float
    source: str
    is_measured: bool = False


class KnownSteps(StrictConfig):
    """Steps that were measured on this machine."""

    step_s: float = Field(gt=0)
    peak_bytes: int
    measured_at: float = Field(description="Seconds since the epoch.")
    by: str = Field(description="What measured them.")


def remember(train: TrainStageConfig, seq_len: int, steps: Steps, by: str) -> KnownSteps:
    """Keep what steps of these settings took here."""
    known = KnownSteps(step_s=steps.step_s, peak_bytes=steps.peak_bytes, measured_at=time.time(), by=by)
    keep(_name(train, seq_len), known)
    return known


def known_steps(train: TrainStageConfig, seq_len: int) -> KnownSteps | None:
    """What was kept of these settings, if anything."""
    return recall(_name(train, seq_len), KnownSteps)


def plan_speed(
    train: TrainStageConfig, seq_len: int, hardware: Hardware | None, core_flops: float, num_cores: float
) -> SpeedPlan:
    """Seconds of a step. Args: hardware: named for GPUs; None: this machine's. num_cores: the workers' together."""
    known = known_steps(train, seq_len) if hardware is None else None
    if known is not None:
        age = in_words(max(1.0, time.time() - known.measured_at))
        return SpeedPlan(known.step_s, f"measured here by {known.by}, {age} ago", is_measured=True)
    counts = count(train.model, seq_len)
    tokens = train.global_batch_size * seq_len
    flops = (counts.train_flops_per_token + recomputed_flops(train, counts)) * tokens
    resources = train.resources
    if not train.on_accelerator:
        peak = core_flops * min(resources.cpus_per_worker * resources.num_workers, num_cores)
        return SpeedPlan(flops / (peak * CPU_SHARE), f"{CPU_SHARE:.0%} of this machine's matrix-product peak")
    if hardware is None or hardware.bf16_flops is None:
        peak = UNKNOWN_GPU_FLOPS * resources.num_workers
        return SpeedPlan(flops / (peak * CPU_SHARE), f"{CPU_SHARE:.0%} of 300 TFLOP/s: no hardware is named")
    mfu = expected_mfu(train.model.d_model)
    compute_s = flops / (hardware.bf16_flops * mfu * resources.num_workers)
    network_s = communication_s(train, counts.num_params, hardware)
    source = f"{mfu:.0%} of {hardware.name}'s {hardware.bf16_flops / 1e12:,.0f} TFLOP/s"
    if train.on_neuron:
        source += ", the share that GPUs reach: no NeuronCore was measured"
    if network_s > compute_s:
        slower = f"communication takes {network_s / compute_s:.1f} times as long as computing at {source}"
        return SpeedPlan(network_s, slower)
    return SpeedPlan(compute_s, source)


UNKNOWN_GPU_FLOPS = 300e12  # a middling data-centre GPU in bfloat16


def recomputed_flops(train: TrainStageConfig, counts: ModelCounts) -> float:
    """FLOPs per token that the backward computes again."""
    parts = counts.flops_by_part
    if train.activation_checkpointing in ("none", "pointwise"):
        return 0.0
    kept = parts["head"] + (parts["mlp"] if train.activation_checkpointing == "attention" else 0.0)
    return counts.forward_flops_per_token - kept


def communication_s(train: TrainStageConfig, num_params: int, hardware: Hardware) -> float:
    """Seconds that a step's collectives take; they overlap with computing."""
    num_workers = train.resources.num_workers
    if num_workers == 1:
        return 0.0
    link = hardware.intra_node_bytes_per_s if num_workers <= GPUS_PER_NODE else hardware.inter_node_bytes_per_s
    return train.backend.traffic(num_params, num_workers, train.accumulation_steps) / (link * LINK_SHARE)


def _name(train: TrainStageConfig, seq_len: int) -> str:
    resources = train.resources
    facts = [
        train.model.model_dump_json(), seq_len, train.worker_micro_batch_size, train.accumulation_steps,
        train.backend.model_dump_json(), resources.num_workers, train.threads_per_worker, train.on_gpu,
        train.autocast_bf16, train.trains_in_float8, train.activation_checkpointing, train.cuda_graphs,
        train.deterministic,
    ]  # fmt: skip
    return f"steps-{digest(repr(facts))}"

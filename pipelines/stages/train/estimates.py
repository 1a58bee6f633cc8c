"""Estimates of training from its configuration alone: parameters, tokens, FLOPs, memory, time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from base.cache import cache_dir
from bmojo.counting import count
from pipelines.engine.stage import Estimate, StageNode
from pipelines.stages.tokenize.stage import planned_vocab_size
from pipelines.stages.train.device import CPU, measure_peak
from pipelines.stages.train.stage import TrainStage, padded_vocab_size

GPU_PEAK_FLOPS = 300e12  # a middling data-centre GPU in bfloat16, for want of the real one while planning
EXPECTED_MFU = 0.35
MOST_CORE_FLOPS = 1e14  # no core is as fast; a cached figure above it is damaged


@dataclass(frozen=True)
class TrainEstimate:
    """Bytes are per worker and leave out activations, which grow with the micro batch; time assumes EXPECTED_MFU."""

    num_params: int
    num_tokens: int
    train_flops: float
    state_bytes_per_worker: int
    time_s: float


def estimate_all(stages: Sequence[StageNode[TrainStage]], num_cores: float) -> Estimate:
    """The train stages of a pipeline, one below the other, and the time of all."""
    core_flops = core_peak()
    estimates = {node.name: estimate_training(node, core_flops, num_cores) for node in stages}
    return Estimate(
        columns=("train stage", "parameters", "tokens", "FLOPs", "state a worker", "time"),
        rows=[
            (
                name,
                f"{estimate.num_params / 1e6:,.2f} M",
                f"{estimate.num_tokens / 1e6:,.2f} M",
                f"{estimate.train_flops:.2e}",
                f"{estimate.state_bytes_per_worker / 2**20:,.0f} MiB",
                f"about {in_words(estimate.time_s)}",
            )
            for name, estimate in estimates.items()
        ],
        note=f"All training: about {in_words(sum(estimate.time_s for estimate in estimates.values()))}; the other "
        f"stages are not counted. Time assumes {EXPECTED_MFU:.0%} of the matrix-product peak (this machine's for CPU "
        "stages); memory leaves out activations.",
    )


def in_words(seconds: float) -> str:
    """A duration in a unit of readable size."""
    if seconds > 100 * 365 * 86400:
        return "more than 100 years"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{max(1, seconds):.0f} s"


def estimate_training(node: StageNode[TrainStage], core_flops: float, num_cores: float) -> TrainEstimate:
    """Estimate a train stage whose tokenizer may not exist yet: its vocabulary is taken to have the size asked for.

    Args: core_flops: of one core, as core_peak gives it. num_cores: that the workers can have together, at most.
    """
    train, tokens = node.config, node.inputs.tokens[0]
    seq_len = tokens.config.seq_len
    model = train.model
    if model.vocab_size is None:
        model = model.with_vocab_size(padded_vocab_size(planned_vocab_size(tokens)))
    counts = count(model, seq_len)
    num_tokens = train.num_steps(seq_len) * train.global_batch_size * seq_len
    flops = counts.train_flops_per_token * num_tokens
    resources = train.resources
    if train.on_gpu:
        peak = GPU_PEAK_FLOPS * resources.gpus_per_worker * resources.num_workers
    else:
        peak = core_flops * min(resources.cpus_per_worker * resources.num_workers, num_cores)
    return TrainEstimate(
        num_params=counts.num_params,
        num_tokens=num_tokens,
        train_flops=flops,
        state_bytes_per_worker=train.backend.state_bytes(counts.num_params, resources.num_workers),
        time_s=flops / (peak * EXPECTED_MFU),
    )


def core_peak() -> float:
    """float32 matrix-product FLOP/s of one core of this machine: the best ever measured here.

    A busy machine measures too little, never too much. So the best is kept in the cache folder, and an estimate depends
    on the machine rather than on the moment.
    """
    folder = cache_dir()
    machine = re.sub(r"[^\w.-]+", "-", f"{platform.node()}-{platform.machine()}-torch-{torch.__version__}")
    file = folder / f"core-peak-{machine}.json"
    known = 0.0
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = float(json.loads(file.read_text()))
    if not 0 <= known < MOST_CORE_FLOPS:
        known = 0.0
    best = max(known, *(measure_core_peak() for _ in range(1 if known else 5)))
    if best > known:
        with contextlib.suppress(OSError):  # then it is measured again next time
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(best))
            part.replace(file)
    return best


def measure_core_peak() -> float:
    """float32 matrix-product FLOP/s of one core: the best of a twentieth of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_peak(CPU, size=512, duration_s=0.05)
    finally:
        torch.set_num_threads(threads)

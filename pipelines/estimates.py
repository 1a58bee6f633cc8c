"""What a train stage will take, from its configuration alone: parameters, tokens, FLOPs, memory, time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from dataclasses import dataclass

from data.sources.digests import cache_root
from pipelines.stages.tokenize.stage import TokenizeStageConfig
from pipelines.stages.tokenizer.stage import TokenizerStageConfig
from pipelines.stages.train.config import TrainStageConfig

GPU_PEAK_FLOPS = 300e12  # a middling data-centre GPU in bfloat16, for want of the real one while planning
EXPECTED_MFU = 0.35
MOST_CORE_FLOPS = 1e14  # no core is as fast; a cached figure above it is damaged
FLOAT_BYTES = 4
ADAMW_MOMENTS = 2


@dataclass(frozen=True)
class TrainEstimate:
    """Bytes are per worker and leave out activations, which grow with micro_batch_size; time assumes EXPECTED_MFU."""

    num_params: int
    num_tokens: int
    train_flops: float
    state_bytes_per_worker: int
    time_s: float


def estimate_training(
    train: TrainStageConfig,
    tokenize: TokenizeStageConfig,
    tokenizer: TokenizerStageConfig,
    core_flops: float,
    num_cores: float,
) -> TrainEstimate:
    """Estimate a train stage whose tokenizer may not exist yet: its vocabulary is taken to have the size asked for.

    Args: core_flops: of one core, as core_peak gives it. num_cores: that the workers can have together, at most.
    """
    from bmojo.counting import count
    from pipelines.stages.train.stage import padded_vocab_size

    model = train.model
    if model.vocab_size is None:
        model = model.with_vocab_size(padded_vocab_size(tokenizer.vocab_size))
    counts = count(model, tokenize.seq_len)
    num_tokens = train.num_steps(tokenize.seq_len) * train.global_batch_size * tokenize.seq_len
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
        state_bytes_per_worker=_state_bytes(counts.num_params, train.zero_stage, resources.num_workers),
        time_s=flops / (peak * EXPECTED_MFU),
    )


def _state_bytes(num_params: int, zero_stage: int, num_workers: int) -> int:
    """Parameters, gradients, AdamW's moments and master copy, each sharded from its ZeRO stage on."""
    share = num_params / num_workers
    parameters = share if zero_stage >= 3 else num_params
    gradients = share if zero_stage >= 2 else num_params
    optimizer = (ADAMW_MOMENTS + 1) * (share if zero_stage >= 1 else num_params)
    return int(FLOAT_BYTES * (parameters + gradients + optimizer))


def core_peak() -> float:
    """float32 matrix-product FLOP/s of one core of this machine: the best ever measured here.

    A busy machine measures too little, never too much. So the best is kept in the cache folder, and an estimate depends
    on the machine rather than on the moment.
    """
    import torch

    folder = cache_root()
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
    import torch

    size = 512
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a_mk, b_kn = torch.randn(size, size), torch.randn(size, size)
        best_s, end = float("inf"), time.perf_counter() + 0.05
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a_mk, b_kn)
            best_s = min(best_s, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return float(2 * size**3 / best_s)

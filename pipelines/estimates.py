"""What a train stage will take, from its configuration alone: parameters, tokens, FLOPs, memory, time."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipelines.stages.tokenize import TokenizeStageConfig
from pipelines.stages.tokenizer import TokenizerStageConfig
from pipelines.training.config import TrainStageConfig

GPU_PEAK_FLOPS = 300e12  # a middling data-centre GPU in bfloat16, for want of the real one while planning
EXPECTED_MFU = 0.35
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
    train: TrainStageConfig, tokenize: TokenizeStageConfig, tokenizer: TokenizerStageConfig, cpu_peak_flops: float
) -> TrainEstimate:
    """Estimate a train stage whose tokenizer may not exist yet: its vocabulary is taken to have the size asked for.

    Args: cpu_peak_flops: of one core, as measure_core_peak gives it.
    """
    from bmojo.counting import count
    from pipelines.stages.train import padded_vocab_size

    model = train.model
    if model.vocab_size is None:
        model = model.with_vocab_size(padded_vocab_size(tokenizer.vocab_size))
    counts = count(model, tokenize.seq_len)
    num_tokens = train.num_steps(tokenize.seq_len) * train.global_batch_size * tokenize.seq_len
    flops = counts.train_flops_per_token * num_tokens
    resources = train.resources
    peak = GPU_PEAK_FLOPS * resources.gpus_per_worker if train.on_gpu else cpu_peak_flops * resources.cpus_per_worker
    return TrainEstimate(
        num_params=counts.num_params,
        num_tokens=num_tokens,
        train_flops=flops,
        state_bytes_per_worker=_state_bytes(counts.num_params, train.zero_stage, resources.num_workers),
        time_s=flops / (peak * resources.num_workers * EXPECTED_MFU),
    )


def _state_bytes(num_params: int, zero_stage: int, num_workers: int) -> int:
    """Parameters, gradients, AdamW's moments and master copy, each sharded from its ZeRO stage on."""
    share = num_params / num_workers
    parameters = share if zero_stage >= 3 else num_params
    gradients = share if zero_stage >= 2 else num_params
    optimizer = (ADAMW_MOMENTS + 1) * (share if zero_stage >= 1 else num_params)
    return int(FLOAT_BYTES * (parameters + gradients + optimizer))


def measure_core_peak() -> float:
    """float32 matrix-product FLOP/s of one core: the best of a tenth of a second."""
    import torch

    size = 512
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a_mk, b_kn = torch.randn(size, size), torch.randn(size, size)
        best_s, end = float("inf"), time.perf_counter() + 0.1
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a_mk, b_kn)
            best_s = min(best_s, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return float(2 * size**3 / best_s)

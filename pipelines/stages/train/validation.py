"""Validation loss: always the same sequences, summed in the same order whatever the number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from data.shards import TokenBatch
from pipelines.stages.train.guards.pulse import beat
from pipelines.stages.train.trainer import Trainer


def validation_loss(trainer: Trainer, micro_batches: Sequence[TokenBatch]) -> float:
    """Mean NLL in nats per token over `micro_batches`, which are the same on every rank. A collective.

    Rank r takes micro batches r, r + num_workers, ... (every rank makes the same number of forwards, as ZeRO 3 needs).
    Each micro batch's sum is computed by one rank alone and the sums are added in order in float64, so that the value
    does not depend on the number of workers. The host waits for the device once, at the end.
    """
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    sums = torch.zeros(len(micro_batches), dtype=torch.float64, device=trainer.exact_device)
    own_counts = [0] * len(micro_batches)
    for first in range(0, len(micro_batches), num_workers):
        beat("validates")
        index = first + rank
        batch = micro_batches[min(index, len(micro_batches) - 1)]
        nll_bt = trainer.token_losses(batch)
        if index < len(micro_batches):
            sums[index] = nll_bt.double().sum()
            own_counts[index] = int((batch.targets_bt >= 0).sum())
    counts = torch.tensor(own_counts, dtype=torch.int64, device=trainer.exact_device)
    dist.all_reduce(sums)
    dist.all_reduce(counts)
    total = 0.0
    for value in sums.tolist():
        total += value
    return total / int(counts.sum())

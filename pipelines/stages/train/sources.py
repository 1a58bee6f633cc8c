"""Losses by source of a mixture: the same loss, summed over the sequences of each source alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from data.shards import TokenBatch
from data.streaming import TokenStream
from pipelines.stages.train.device import copy_to
from pipelines.stages.train.trainer import Trainer


def mean_by_weight(losses: Mapping[str, float], weights: Mapping[str, float] | None) -> float | None:
    """The losses of the sources in the shares of the mixture; None where there are none.

    A source of weight 0 does not count, unless all have it.
    """
    if not losses:
        return None
    known = {name: weights[name] if weights else 1.0 for name in losses}
    if not sum(known.values()):
        known = dict.fromkeys(losses, 1.0)
    return sum(loss * known[name] for name, loss in losses.items()) / sum(known.values())


def source_losses(
    trainer: Trainer, stream: TokenStream, step: int, micro_batches: Sequence[TokenBatch], names: Sequence[str]
) -> dict[str, float]:
    """Mean NLL per token, in nats, of each source in global batch `step` (from 0); those that are in it. A collective.

    Costs a forward pass, which a training step does not give by sequence.
    """
    sources = torch.tensor([place.source for place in stream.places(step)], device=trainer.exact_device)
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=trainer.exact_device)
    for batch, of_rows in zip(micro_batches, sources.split(stream.micro_batch_size), strict=True):
        nll_b = trainer.token_losses(batch).double().sum(dim=1)
        targets_b = copy_to(trainer.exact_device, (batch.targets_bt >= 0).sum(dim=1).double())
        sums.index_add_(1, of_rows, torch.stack((nll_b, targets_b)))
    dist.all_reduce(sums)
    total, count = sums.tolist()
    return {name: total[i] / count[i] for i, name in enumerate(names) if count[i]}

"""Real optimizer steps, timed, and the memory they took: what plans are compared with, and what times come from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field

from data.shards import TokenBatch
from pipelines.engine.stage import Facts
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import peak_memory, synchronize
from pipelines.stages.train.trainer import Trainer

MOST_MICRO_BATCHES = 8  # of a step that is measured: more take as long each


class Steps(Facts):
    """What real steps took."""

    step_s: float = Field(description="Median seconds of an optimizer step.")
    peak_bytes: int = Field(description="Most memory of a worker: allocated on a GPU, resident on the CPU.")
    start_bytes: int = Field(description="The same, before it had a model.")
    num_workers: int
    first_peak_bytes: int = Field(0, description="The same as peak_bytes, after a step on fewer rows.")
    tokens: str = Field("random tokens", description="What the steps were taken on.")
    losses: tuple[float, ...] = Field((), description="Training loss of each step.")


class Repeats(NamedTuple):
    """How often steps are taken: `dropped`, then at least `fewest`, and more until `enough_s` seconds are over."""

    dropped: int = 2
    fewest: int = 3
    enough_s: float = 5.0
    most: int = 20


def take_steps(
    trainer: Trainer, config: TrainStageConfig, micro_batches: Sequence[TokenBatch], start_bytes: int, repeats: Repeats
) -> Steps:
    """Take steps on the same micro batches with a small learning rate, and say what they took. A collective."""
    times_s: list[float] = []
    losses = []
    for number in range(repeats.dropped + repeats.most):
        dist.barrier()
        start = time.perf_counter()
        result = trainer.step(micro_batches, config.lr * 1e-3)
        synchronize(trainer.device)
        times_s.append(time.perf_counter() - start)
        losses.append(float(result.loss))
        taken = times_s[repeats.dropped :]
        done = number + 1 >= repeats.dropped + repeats.fewest and sum(taken) >= repeats.enough_s
        if _any(done, trainer.exact_device):
            break
    most = torch.tensor([peak_memory(trainer.device), start_bytes], dtype=torch.int64, device=trainer.exact_device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    peak_bytes, first_bytes = most.tolist()
    return Steps(
        step_s=statistics.median(times_s[repeats.dropped :]),
        peak_bytes=peak_bytes,
        start_bytes=first_bytes,
        num_workers=dist.get_world_size(),
        losses=tuple(losses),
    )


def stand_in_tokens(config: TrainStageConfig, seq_len: int, vocab_size: int, rank: int) -> list[TokenBatch]:
    """Micro batches of random ids, as many as a worker takes per step, each row one document."""
    generator = torch.Generator().manual_seed(config.seed + rank)
    batches = []
    for _ in range(config.accumulation_steps):
        ids = torch.randint(vocab_size, (config.worker_micro_batch_size, seq_len + 1), generator=generator)
        documents_bt = torch.zeros(config.worker_micro_batch_size, seq_len, dtype=torch.int64)
        wanted_bt = torch.ones_like(documents_bt, dtype=torch.bool) if config.model.selection == "oracle" else None
        batches.append(TokenBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents_bt, wanted_bt))
    return batches


def _any(own: bool, device: torch.device) -> bool:
    flag = torch.tensor(float(own), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)

"""How training that has gone wrong is found and what is said about it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from base.errors import UserError
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.trainer import Trainer

_RUINED = 2.0  # times the loss of guessing among all ids alike


def is_ruined(loss: float, vocab_size: int | None) -> bool:
    """Whether a validation loss, in nats per token, is that of no model: not finite, or far worse than guessing."""
    assert vocab_size is not None
    return not loss <= _RUINED * math.log(vocab_size)


def first_ruined_tensor(trainer: Trainer) -> str | None:
    """Key of a named tensor that is not finite, if there is one. A collective; every rank sees the same.

    Each rank looks at its pieces; the host waits for the device once.
    """
    keys, pieces = list(trainer.shapes), trainer.pieces()
    largest = torch.zeros(len(keys), device=trainer.exact_device)  # absolute value of each piece
    for index, key in enumerate(keys):
        if key in pieces:
            # One pass without a copy; it is NaN if one of the values is.
            largest[index] = torch.linalg.vector_norm(pieces[key].values, ord=math.inf)
    ruined = (~torch.isfinite(largest)).int()
    dist.all_reduce(ruined)
    return next((key for key, count in zip(keys, ruined.tolist(), strict=True) if count), None)


def diverged(job: TrainJob, saved_step: int | None, what: str) -> UserError:
    """The error that ends training: what happened, the last checkpoint and what to try."""
    if saved_step is None:
        last_good = "There is no checkpoint before it"
    else:
        last_good = f"The last good checkpoint is {job.artifact.url}/{step_dir(saved_step)}"
    return UserError(
        f"Training diverged: {what}. {last_good}. Try a lower lr (now {job.config.lr:g}), more warmup_steps (now "
        f"{job.config.warmup_steps}), a smaller grad_clip (now {job.config.grad_clip:g}), or precision: fp32."
    )

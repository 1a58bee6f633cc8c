"""How training that has gone wrong is found and what is said about it."""

from __future__ import annotations

import math

import torch

from base.errors import UserError
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.trainer import PARAM, Trainer

_RUINED = 2.0  # times the loss of guessing among all ids alike


def is_ruined(loss: float, vocab_size: int | None) -> bool:
    """Whether a validation loss, in nats per token, is that of no model: not finite, or far worse than guessing."""
    assert vocab_size is not None
    return not loss <= _RUINED * math.log(vocab_size)


def first_ruined_parameter(trainer: Trainer) -> str | None:
    """Name of a parameter that is not finite, if there is one. A collective; every rank sees the same."""
    for key in trainer.shapes:
        prefix, name = key.split("/", 1)
        if prefix == PARAM and not bool(torch.isfinite(trainer.tensor(key)).all()):
            return name
    return None


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

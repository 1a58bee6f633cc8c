"""What the training loop asks of whatever updates the weights (docs/design/0022).

A trainer is made by a backend (pipelines/stages/train/backends) on every worker, from a model on the CPU whose weights
are set and the same on every rank. It owns the model from then on: its device, its sharding, its optimizer. The loop
sees host batches, tensors by name and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from base.errors import UserError
from bmojo import BMojoLM
from data.shards import TokenBatch
from pipelines.stages.train.device import copy_to
from pipelines.stages.train.pieces import Piece, Read
from pipelines.stages.train.telemetry.times import StepTimes

PARAM = "param"


class StepResult(NamedTuple):
    """What one optimizer step did, as scalars on the exact device: only who reads one waits for the step.

    loss: mean training loss of the global batch, in nats per target, before the update; float64.
    num_targets: targets of all workers together; int64.
    grad_norm: global gradient norm before clipping; on the host if the trainer had to know it. Not finite: the step was
        not applied, and the moments and AdamW's step count are as before it.
    """

    loss: torch.Tensor
    num_targets: torch.Tensor
    grad_norm: torch.Tensor


BeforeUpdate = Callable[[Mapping[str, Piece]], None]
"""Looks at gradients; weights and state are still those before the step."""


class Trainer(Protocol):
    """A model and its optimizer. Methods are collectives but for `pieces`: all ranks call them in the same order.

    The named tensors are all of the training state that has the size of the model: `param/NAME` for each parameter and
    its optimizer state, such as AdamW's `exp_avg/NAME` and `exp_avg_sq/NAME`; in float32 however the backend shards
    them. They are what a checkpoint holds, so that it can be resumed by another backend or on another number of
    workers.
    """

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""

    @property
    def exact_device(self) -> torch.device:
        """Where losses, counts and what ranks agree on are kept: `device`, or the host beside one without 64 bits.

        Collectives over all ranks work there.
        """

    @property
    def times(self) -> StepTimes:
        """Where it puts the seconds of its steps, and the loop those of its own."""

    @property
    def model(self) -> BMojoLM:
        """What it trains, to look inside; under sharding a parameter is there only where its layer runs."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that make the numbers."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Whole shape of each named tensor; the same order on every rank."""

    def step(
        self,
        micro_batches: Sequence[TokenBatch],
        lr: float,
        loss_limit: torch.Tensor | None = None,
        before_update: BeforeUpdate | None = None,
    ) -> StepResult:
        """Take one optimizer step on this worker's micro batches, at least one and as many on every rank.

        The gradient is that of the mean over all targets of the global batch: how the targets are spread over micro
        batches and workers changes rounding only.

        Args:
            loss_limit: a step with a greater loss is not applied, and its norm is not finite; on the exact device.
            before_update: is given this rank's pieces of the clipped gradient, by the parameters' names, right before
                they are used: in one call or in several, each element once.
        """

    def token_losses(self, batch: TokenBatch) -> torch.Tensor:
        """NLL of each target in nats (b, t), float32, on the exact device, without a graph; 0 where there is none."""

    def averaged(self) -> AbstractContextManager[None]:
        """With `ema_decay`: inside, the moving average of the weights is in the place of the weights, and they in its.

        For losses and for reading tensors; no step may be taken.
        """

    def tensor(self, key: str) -> torch.Tensor:
        """A named tensor, whole. May share memory with the trainer's own: copy it to keep it."""

    def pieces(self) -> Mapping[str, Piece]:
        """The parts of the named tensors that this rank answers for: over all ranks each element once.

        Without communication. Ranks have pieces of different keys, in the order of `shapes`.
        """

    def replicas(self) -> Mapping[str, torch.Tensor]:
        """The named tensors that each rank holds whole for itself, which are alike if nothing went wrong. Without
        communication."""

    def load(self, read: Read, num_steps: int) -> None:
        """Put back parameters, optimizer state and the optimizer's step count; each rank reads what it holds.

        Also in the middle of training, between two steps. Whatever the named tensors were before leaves no trace.
        """


def named_shapes(
    parameters: Mapping[str, torch.Size], state_names: Mapping[str, Sequence[str]]
) -> dict[str, torch.Size]:
    """Shapes of the named tensors from those of the parameters. Args: state_names: of each parameter."""
    return {f"{prefix}/{name}": shape for name, shape in parameters.items() for prefix in (PARAM, *state_names[name])}


class TargetCounts(NamedTuple):
    """Targets of each of this worker's micro batches, and of the global batch: int64, on the device."""

    of_micro_batches: list[int]
    total: torch.Tensor


def count_targets(micro_batches: Sequence[TokenBatch], device: torch.device) -> TargetCounts:
    """Count what a step's losses are averaged over, without waiting for the device. A collective."""
    counts = [int((batch.targets_bt >= 0).sum()) for batch in micro_batches]
    total = torch.full((), sum(counts), dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return TargetCounts(counts, total)


def mean_loss(loss_sum: torch.Tensor, num_targets: torch.Tensor) -> torch.Tensor:
    """Loss of the global batch from this worker's sum over its targets, and all targets. A collective."""
    total = loss_sum.clone()
    dist.all_reduce(total)
    return total / num_targets


def refused_above(limit: torch.Tensor | None, loss: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The factor of a step's last gradients: NaN if the loss is above the limit, else `scale`.

    So what refuses a gradient that is not finite refuses the step too, wherever that is decided, without a wait.
    """
    return scale if limit is None else torch.where(loss > limit, torch.nan, scale)


def require_targets(num_targets: int) -> None:
    """Refuse a step that had nothing to learn, and was not applied: its gradient norm is NaN. Raises UserError."""
    if not num_targets:
        raise UserError(
            "no token of a global batch is an answer that the loss would count. Raise train.global_batch_size, or make "
            "the task's documents shorter than seq_len."
        )


def to_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """Copy a batch to the device, without waiting for it."""
    return batch.map(partial(copy_to, device))

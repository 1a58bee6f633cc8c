"""Which steps were applied, on how much, and what they lost: learned from the device when a step needs it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from pipelines.stages.train.checkpoint import TrainingState
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.curves import Curves
from pipelines.stages.train.guards.config import SpikeAction
from pipelines.stages.train.guards.incidents import Incidents
from pipelines.stages.train.guards.spikes import LossLimit, SpikeGuard
from pipelines.stages.train.trainer import StepResult, require_targets

MOST_UNCHECKED = 100  # steps that are begun before one that was not applied is noticed, at most


class CheckedStep(NamedTuple):
    """A step as the host knows it. loss: in nats per target; grad_norm: not finite if the step was not applied."""

    step: int
    num_targets: int
    loss: float
    grad_norm: float

    @property
    def was_applied(self) -> bool:
        """The weights are other ones since."""
        return math.isfinite(self.grad_norm)


class _Begun(NamedTuple):
    """A step that the device may not have finished."""

    step: int
    result: StepResult
    limit: LossLimit | None


class StepLedger:
    """Keeps the results of steps on the device, and checks them all at once."""

    def __init__(
        self,
        config: TrainStageConfig,
        device: torch.device,
        num_steps: int,
        curves: Curves,
        incidents: Incidents,
        diverged: Callable[[str], Exception],
    ) -> None:
        """`diverged`: makes the error that ends training, from what happened."""
        self.skipped: list[int] = []  # steps that were left out
        self.num_tokens = 0
        self.train_loss = math.nan  # of the last step that was applied
        self.spikes = SpikeGuard(config.spikes, device) if config.spikes is not None else None
        self.recent_losses: deque[float] = deque(maxlen=config.spikes.window if config.spikes is not None else 0)
        self.left_out: set[int] = set()  # steps whose batches a rewind leaves out, also those that are to come
        self.spike: CheckedStep | None = None  # that training must go back before
        self._rewinds = config.spikes is not None and config.spikes.action is SpikeAction.REWIND
        self._max_skipped, self._num_steps = config.max_skipped_steps, num_steps
        self._curves, self._incidents, self._diverged = curves, incidents, diverged
        self._last: CheckedStep | None = None
        self._begun: list[_Begun] = []
        self._limit: LossLimit | None = None

    def loss_limit(self) -> torch.Tensor | None:
        """What the next step's loss may be at most to be applied; None where it always is."""
        self._limit = self.spikes.limit() if self.spikes is not None else None
        only_told = self.spikes is None or self.spikes.config.action is SpikeAction.REPORT
        return None if self._limit is None or only_told else self._limit.limit

    def add(self, step: int, result: StepResult) -> None:
        """Take in a step."""
        self._begun.append(_Begun(step, result, self._limit))
        if self.spikes is not None:
            self.spikes.add(result.loss, result.grad_norm)

    @property
    def is_check_due(self) -> bool:
        """The host knows of the last step already, or many are unchecked."""
        return bool(self._begun) and (self._begun[-1].result.grad_norm.is_cpu or len(self._begun) >= MOST_UNCHECKED)

    def check(self) -> int:
        """Learn of the steps since the last check, waiting for the device. Returns their targets.

        Raises: UserError: nothing to learn in a step, more steps left out than may be, or a loss that is not finite.
        """
        begun, self._begun = self._begun, []
        if not begun:
            return 0
        figures = torch.stack([_figures(each) for each in begun]).tolist()  # the only wait for the device
        checked_targets = 0
        for number, (num_targets, loss, norm, median, limit) in enumerate(figures):
            require_targets(int(num_targets))
            checked_targets += int(num_targets)
            step = CheckedStep(begun[number].step, int(num_targets), loss, norm)
            self._check(step, median, limit)
            if self.spike is not None:
                self._begun = begun[number + 1 :]  # in vain, or looked at if there is nothing to go back to
                break
        return checked_targets

    def restore(self, state: TrainingState) -> None:
        """Take up what a checkpoint says of the steps up to it; what was decided of later ones stays."""
        self.skipped, self.num_tokens, self.train_loss = list(state.skipped_steps), state.num_tokens, state.train_loss
        self.left_out |= set(state.left_out)
        self._begun, self.spike = [], None
        if self.spikes is not None:
            self.recent_losses.clear()
            self.recent_losses.extend(state.recent_losses)
            self.spikes.load(self.recent_losses)

    def plan_rewind(self, spike: CheckedStep, from_step: int) -> None:
        """Decide, before the checkpoint of `from_step` is taken up, which steps are left out for a spike."""
        assert self.spikes is not None
        first = max(from_step + 1, spike.step - self.spikes.config.rewind_before)
        self.left_out |= set(range(first, spike.step + 1))

    def give_up_rewind(self) -> None:
        """There is nothing to go back to: the step is only left out, and the later ones count."""
        spike, self.spike = self.spike, None
        assert spike is not None
        self._skip(spike.step, "loss is a spike, before the first checkpoint", kind="spike", loss=spike.loss)

    def leaves_out(self, step: int) -> bool:
        """Whether training passes over a step's batch, because it went back before a spike."""
        if step not in self.left_out:
            return False
        self._count_skipped(step, "batch is left out since training went back before a spike")
        return True

    def applied(self, step: int) -> CheckedStep | None:
        """The last step that was checked, if it is this one and was applied."""
        last = self._last
        return last if last is not None and last.step == step and last.was_applied else None

    def _check(self, step: CheckedStep, median: float, limit: float) -> None:
        self._last = step
        if limit < step.loss < math.inf:
            self._note_spike(step, median, limit)
        elif not step.was_applied:
            self._skip(step.step, "loss or gradients are not finite", kind="not_finite", loss=_finite(step.loss))
        if step.was_applied:
            self.num_tokens += step.num_targets
            self.train_loss = step.loss
            self.recent_losses.append(step.loss)
            if not math.isfinite(step.loss):
                raise self._diverged(f"the loss is {step.loss} at step {step.step} of {self._num_steps}")

    def _note_spike(self, step: CheckedStep, median: float, limit: float) -> None:
        assert self.spikes is not None
        z = self.spikes.z_of(step.loss, median, limit)
        figures = {"loss": step.loss, "limit": limit, "z": z}
        what = f"loss {step.loss:.4g} is a spike, z = {z:.1f} (above {limit:.4g}, median {median:.4g})"
        self._curves.add(step.step, {"train/spike_z": z})
        if step.was_applied:
            message = f"step {step.step} of {self._num_steps} was applied: {what}."
            self._incidents.add("spike", step.step, message, action="report", **figures)
        elif self._rewinds:
            message = f"training goes back before step {step.step} of {self._num_steps}: {what}."
            self._incidents.add("spike", step.step, message, action="rewind", **figures)
            self.spike = step
        else:
            self._skip(step.step, what, kind="spike", **figures)

    def _skip(self, step: int, why: str, kind: str, **figures: float | None) -> None:
        """Note a step that the trainer did not apply. Raises: UserError: it is one too many."""
        self._count_skipped(step, why)
        message = (
            f"step {step} of {self._num_steps} was left out: {why} ({len(self.skipped)} of "
            f"max_skipped_steps={self._max_skipped}). `bmojo lineage` shows what it read."
        )
        self._incidents.add(kind, step, message, action="skip", **figures)

    def _count_skipped(self, step: int, why: str) -> None:
        before, self.skipped = self.skipped, sorted({*self.skipped, step})
        if len(self.skipped) > self._max_skipped:
            skipped = f"; left out before: {', '.join(map(str, before))} (max_skipped_steps)" if before else ""
            at = f"step {step} of {self._num_steps}"
            raise self._diverged(f"{why} at {at}, which was not applied{skipped}")
        self._curves.add(step, {"train/skipped_steps": len(self.skipped)})


def _figures(begun: _Begun) -> torch.Tensor:
    """Targets, loss, gradient norm, median and limit of a step, on the device; float64 holds them exactly."""
    result, device = begun.result, begun.result.loss.device
    known = [result.num_targets, result.loss, result.grad_norm]
    endless = torch.full((), torch.inf, dtype=torch.float64, device=device)
    of_window = [endless, endless] if begun.limit is None else begun.limit
    return torch.stack([value.to(device).double() for value in (*known, *of_window)])


def _finite(value: float) -> float | None:
    """JSON has no number for the others."""
    return value if math.isfinite(value) else None

"""Learning-rate schedules: the rate as a pure function of the step. Nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from base.config import ADDED_LATER, StrictConfig


class Position(NamedTuple):
    """Where training is after the warm-up.

    step: from warmup_steps + 1 to num_steps.  lowest: share of the full rate that a schedule goes down to.
    """

    step: int
    warmup_steps: int
    num_steps: int
    lowest: float

    @property
    def progress(self) -> float:
        """From 0, at the end of the warm-up, to 1, at the last step."""
        return (self.step - self.warmup_steps) / (self.num_steps - self.warmup_steps)


class CosineSchedule(StrictConfig):
    """Warm-up, then half a cosine down to `min_lr_ratio` at the last step (arXiv:1608.03983, without restarts)."""

    kind: Literal["cosine"] = "cosine"

    def share(self, at: Position) -> float:
        """Learning rate as a share of the full one."""
        return at.lowest + (1 - at.lowest) * 0.5 * (1 + math.cos(math.pi * at.progress))


class LinearSchedule(StrictConfig):
    """Warm-up, then a straight line down to `min_lr_ratio` at the last step."""

    kind: Literal["linear"]

    def share(self, at: Position) -> float:
        """Learning rate as a share of the full one."""
        return 1 - (1 - at.lowest) * at.progress


class WsdSchedule(StrictConfig):
    """Warm-up, stable, then a decay to `min_lr_ratio` over the last part of training (arXiv:2404.06395, section 4)."""

    kind: Literal["wsd"]
    decay_fraction: float = Field(0.2, gt=0, le=1, description="Share of all steps, at the end, over which lr decays.")
    decay: Literal["linear", "sqrt"] = Field(
        "linear",
        description="Shape of the decay: linear, or 1 - sqrt(progress), which falls faster at first "
        "(arXiv:2405.18392, equation 2).",
        json_schema_extra=ADDED_LATER,
    )

    def share(self, at: Position) -> float:
        """Learning rate as a share of the full one."""
        decay_steps = min(math.ceil(self.decay_fraction * at.num_steps), at.num_steps - at.warmup_steps)
        progress = max(0.0, (at.step - (at.num_steps - decay_steps)) / decay_steps)
        return 1 - (1 - at.lowest) * (math.sqrt(progress) if self.decay == "sqrt" else progress)


class ConstantSchedule(StrictConfig):
    """Warm-up, then the full rate to the end. `min_lr_ratio` has no part in it."""

    kind: Literal["constant"]

    def share(self, at: Position) -> float:
        """Learning rate as a share of the full one."""
        return 1.0


class InverseSqrtSchedule(StrictConfig):
    """Warm-up, then lr * sqrt(warmup_steps / step), never below `min_lr_ratio` (arXiv:1706.03762, section 5.3).

    It does not depend on the length of training, which can therefore be raised later.
    """

    kind: Literal["inverse_sqrt"]

    def share(self, at: Position) -> float:
        """Learning rate as a share of the full one; without a warm-up, of that of step 1."""
        return max(at.lowest, math.sqrt(max(at.warmup_steps, 1) / at.step))


Schedule = Annotated[
    CosineSchedule | LinearSchedule | WsdSchedule | ConstantSchedule | InverseSqrtSchedule,
    Field(discriminator="kind"),
]

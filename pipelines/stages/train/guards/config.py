"""Settings of the guards."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, NonNegativeInt, PositiveFloat

from base.config import StrictConfig


class SpikeAction(StrEnum):
    """What a loss spike leads to."""

    REPORT = "report"
    SKIP = "skip"
    REWIND = "rewind"


class SpikeConfig(StrictConfig):
    """A loss that is far above those before it: a step with a loss above median + z x spread of the last losses.

    The spread is 1.4826 times the median distance from the median (MAD), the standard deviation of a normal
    distribution, and at least 1 % of the median, so that a flat curve has no spikes.
    """

    action: SpikeAction = Field(
        SpikeAction.REPORT,
        description="report: a warning, a point of the curve train/spike_z, and the sample ids. skip: the step is not "
        "applied either. rewind: training goes back to the last checkpoint and leaves out the batch, and with it "
        "the rewind_before ones before it. Both count towards max_skipped_steps.",
    )
    z: PositiveFloat = Field(6.0, description="How many times the spread above the median a loss is a spike.")
    window: int = Field(
        128, ge=8, le=1 << 16, description="Losses of applied steps that median and spread are of; no spikes before."
    )
    rewind_before: NonNegativeInt = Field(
        1,
        description="rewind: batches before the one with the spike that are left out too. The loss is measured before "
        "a step's own update, so the update before it may be what ruined the weights.",
    )

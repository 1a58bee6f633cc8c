"""Settings of what a training tells of itself."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from base.config import StrictConfig


class ProfileConfig(StrictConfig):
    """A trace of some steps, by torch's profiler."""

    steps: tuple[PositiveInt, PositiveInt] = Field(description="First and last step of the trace.")
    memory: bool = Field(
        True,
        description="Also who allocates memory: in the table, and on a GPU as a snapshot for "
        "https://docs.pytorch.org/memory_viz.",
    )
    ranks: tuple[NonNegativeInt, ...] = Field((0,), description="Workers that are traced.")

    @model_validator(mode="after")
    def _last_is_not_before_first(self) -> ProfileConfig:
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"profile.steps: found {list(self.steps)}, expected the first step and then the last.")
        return self

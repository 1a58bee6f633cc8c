"""Bounds for figures of an evaluation, beyond which nothing may go on from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from base.config import StrictConfig
from pipelines.stages.evaluate.results import Figure
from pipelines.stages.numbers import with_interval


class Bounds(StrictConfig):
    """What a figure may be. Its value counts, not its interval."""

    min: float | None = Field(None, description="The least that it may be; null: any.")
    max: float | None = Field(None, description="The most that it may be; null: any.")

    @model_validator(mode="after")
    def _one_is_given(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("found neither min nor max: a bound needs one of them.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"found min={self.min:g} above max={self.max:g}: no figure is between them.")
        return self

    def violation(self, figure: Figure) -> str | None:
        """What is wrong with the figure; None: nothing."""
        if math.isnan(figure.value):
            return "is not a number"
        value = with_interval(figure.value, figure.low, figure.high)
        if self.min is not None and figure.value < self.min:
            return f"is {value}, below its min of {self.min:g}"
        if self.max is not None and figure.value > self.max:
            return f"is {value}, above its max of {self.max:g}"
        return None


class GateConfig(StrictConfig):
    """Bounds by figure, and what happens beyond them."""

    figures: dict[str, Bounds] = Field(
        min_length=1, description="Bounds by measure and figure: `{text/loss: {max: 4.0}}`."
    )
    action: Literal["fail", "stop"] = Field(
        "stop",
        description="stop: stages that need this one are not run, and the run ends as STOPPED. fail: this stage fails.",
    )

    def reason(self, found: Mapping[str, Figure | None]) -> str | None:
        """Why the gate is closed; None: it is open. Args: found: the figures by name; None: not found."""
        problems = []
        for name, bounds in self.figures.items():
            figure = found.get(name)
            problem = "was not found" if figure is None else bounds.violation(figure)
            if problem:
                problems.append(f"{name} {problem}")
        return "; ".join(problems) or None

"""What the measures of an evaluation found: kept in the stage's record, compared and drawn by reports.

A figure is f(sum of numerators / sum of denominators) over units: documents, examples, windows. The sums of each unit
are in a file beside the record, from which figures of two models are compared unit by unit.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.engine.stage import Facts


class Figure(Facts):
    """One number about a model."""

    name: str = Field(description="Within its measure: `loss`.")
    value: float
    low: float | None = Field(None, description="Lower end of the 95 % interval; null: not estimated.")
    high: float | None = Field(None, description="Upper end of it.")
    unit: str = Field("", description="`nats per token`; empty: a share, or a number without a unit.")
    better: Literal["lower", "higher"] = "lower"
    transform: Literal["identity", "exp"] = Field("identity", description="What is applied to the ratio of the sums.")
    chance: float | None = Field(None, description="What guessing gets; null: it means nothing here.")
    is_main: bool = Field(False, description="Whether it belongs into a report's first table.")


class CurvePoint(Facts):
    """A point of a curve, with the 95 % interval of y."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Mark(Facts):
    """A dashed line across a plot."""

    x: float
    label: str


class Curve(Facts):
    """A line of a plot. Curves with the same name share a plot: those of other models, and other parts."""

    name: str = Field(description="Within its measure; names the plot's file.")
    title: str
    x_label: str
    y_label: str
    points: tuple[CurvePoint, ...]
    part: str = Field("", description="Tells it from other lines of this model in the plot.")
    mark: Mark | None = None
    log_x: bool = False
    note: str = ""


class SampleText(Facts):
    """A prompt and what the model made of it."""

    prompt: str
    text: str


class MeasureResult(Facts):
    """What one measure found about one model."""

    name: str = Field(description="As the stage names the measure.")
    kind: str
    unit: str = Field(description="What is drawn at random in the intervals: `document`.")
    num_units: int
    figures: tuple[Figure, ...] = ()
    references: tuple[Figure, ...] = Field(
        (), description="Of what the model is compared with, on the same units: gzip -9, the untrained model."
    )
    curves: tuple[Curve, ...] = ()
    samples: tuple[SampleText, ...] = ()
    notes: tuple[str, ...] = Field((), description="What a reader must know to read the figures.")
    units: str | None = Field(None, description="File of the stage's artifact with the sums of each unit.")

    def figure(self, name: str) -> Figure | None:
        """The figure of that name."""
        return next((figure for figure in self.figures if figure.name == name), None)

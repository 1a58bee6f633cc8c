"""What a kind of stage puts on the page of a report, which knows no kinds: a Stage with a method `section`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pipelines.engine.stage import AnyNode
from pipelines.stages.evaluate.results import MeasureResult
from pipelines.storage.artifact import ArtifactDir

Points = Sequence[tuple[float, float]]
"""A curve: (x, y)."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Facts in words. The first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Series:
    """A metric of a training by step. Series with the same `plot` are drawn together, also those of other models."""

    plot: str  # names the plot's file: `loss`
    title: str
    y_label: str
    points: Points  # by step
    part: str = ""  # tells it from other series of this model in the plot
    is_noisy: bool = False  # drawn smoothed, over the faint points
    is_loss: bool = False  # the frame leaves out the steep beginning
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model was trained.

    Two trainings that differ in the seed alone have equal recipes: they are replicates of one.
    """

    series: Sequence[Series]
    tokens: Points  # trained on so far, by step
    seconds: Points  # spent in optimizer steps so far, by step
    recipe: Mapping[str, Any]  # all settings but the seed that decide the result, and digests of what it reads
    seed: int | None


@dataclass(frozen=True)
class LawPoint:
    """A loss at some compute, with its 95 % interval if it has one."""

    name: str
    flops: float
    loss: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """Losses of several sizes against their compute, and the law that was fitted to them. No curve: there is none."""

    name: str  # the stage's
    points: Sequence[LawPoint]
    curve: Sequence[LawPoint]
    predicted: Sequence[LawPoint]
    table: Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """Share of a finished stage in a report."""

    subject: str = ""  # the model that all but `data` is about; sections of the same one are joined
    source: str = ""  # the stage: names a second result of the same measure of this model
    facts: Mapping[str, str] = field(default_factory=dict)  # its row of the table of models, by column
    training: Training | None = None
    results: Sequence[MeasureResult] = ()
    artifact: ArtifactDir | None = None  # holds the files that `results` name
    data: Sequence[Table] = ()  # about data
    laws: Sequence[FittedLaw] = ()  # about several models


@runtime_checkable
class Reported(Protocol):
    """A kind of stage that has a section."""

    def section(self, node: AnyNode) -> Section:
        """The share of a finished stage of this kind."""

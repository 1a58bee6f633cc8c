"""What a kind of stage puts on the page of a `report` stage, which knows no kinds: a Stage with a method `section`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pipelines.engine.stage import AnyNode

Points = Sequence[tuple[float, float]]
"""A curve: (x, y)."""


@dataclass(frozen=True)
class Line:
    """A curve of one subject. `part` tells it from others of that subject; `style` goes to matplotlib."""

    points: Points
    part: str = ""
    style: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One subject's share of a picture. Shares for the same `file` are drawn together, each subject in its colour."""

    file: str
    heading: str  # above the picture
    alt: str
    title: str
    x_label: str
    y_label: str = ""
    note: str = ""  # below the picture


@dataclass(frozen=True, kw_only=True)
class LinePlot(Plot):
    """Curves. The first line is always drawn; `mark` is a dashed line at an x, and its label."""

    lines: Sequence[Line]
    mark: tuple[float, str] | None = None
    height: float = 3.6  # inches


@dataclass(frozen=True, kw_only=True)
class BarPlot(Plot):
    """A bar per subject, and thin grey ones for what it is compared with, by name."""

    value: float
    references: Mapping[str, float] = field(default_factory=dict)  # the same for every subject
    own_references: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Passage:
    """A prompt and its continuation."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """Share of a finished stage in a report. `subject` names it in tables, legends and captions: a model."""

    subject: str
    cells: Mapping[str, str] = field(default_factory=dict)  # its row of the table of results, by column
    notes: Sequence[str] = ()  # below that table; said once, whoever says it
    data: Sequence[str] = ()  # lines about the data behind it; likewise
    plots: Sequence[Plot] = ()
    passages: Sequence[Passage] = ()


@runtime_checkable
class Reported(Protocol):
    """A kind of stage that has a section."""

    def section(self, node: AnyNode) -> Section:
        """The share of a finished stage of this kind."""

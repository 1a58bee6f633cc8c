"""Settings of the `report` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.engine.stage import StageConfig


class ReportStageConfig(StageConfig):
    """One page (HTML, Markdown, JSON) about the train and evaluate stages that it needs, side by side."""

    kind: Literal["report"]
    title: str = Field("", description="Heading of the page; empty: the name of the stage.")
    baseline: str = Field(
        "", description="Model that the others are compared with: its train stage; empty: the first one."
    )

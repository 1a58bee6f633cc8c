"""Settings of the `export` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.stages.base import StageConfig

ExportFormat = Literal["hf"]


class ExportStageConfig(StageConfig):
    """Write the model of the train stage that it needs for use in other programs."""

    kind: Literal["export"]
    format: ExportFormat = Field(
        "hf", description="`hf`: a directory for transformers' from_pretrained(..., trust_remote_code=True)."
    )
    register_as: str | None = Field(
        None, min_length=1, max_length=250, description="Name to register the model under in MLflow; null: do not."
    )

"""Settings of the `export` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipelines.engine.stage import StageConfig

ExportFormat = Literal["hf"]


class ExportStageConfig(StageConfig):
    """Write the model of the train stage that it needs for use in other programs."""

    kind: Literal["export"]
    format: ExportFormat = Field(
        "hf", description="`hf`: a directory for transformers' from_pretrained(..., trust_remote_code=True)."
    )
    register_as: str | None = Field(
        None,
        min_length=1,
        max_length=250,
        description="Name to register the model under in MLflow, without `/` and `:`; null: do not.",
    )

    @field_validator("register_as")
    @classmethod
    def _mlflow_accepts_the_name(cls, name: str | None) -> str | None:
        """MLflow would refuse it when all the training is done."""
        if name is not None and (not name.strip() or name == "." or name.startswith("..") or set("/:") & set(name)):
            raise ValueError(f"{name!r} is no name for a model in MLflow: expected one such as bmojo-130m.")
        return name

"""The pipeline file as one strict pydantic tree. Each kind of stage owns its part; pipelines.stages lists them.

name: quickstart
storage: runs
stages:
  tokenizer: {kind: tokenizer, ...}
  tokens:    {kind: tokenize, needs: [tokenizer], ...}
  train:     {kind: train, needs: [tokens], ...}
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from base.config import StrictConfig
from pipelines.engine.graph import stage_graph
from pipelines.engine.stage import AnyNode, StageConfig
from pipelines.errors import FieldError
from pipelines.stages import STAGES
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.mlflow.target import MlflowConfig

STAGE_NAMES = "The name of a stage is the name of a folder: use at most 40 ASCII letters, digits, `-` and `_`."

if TYPE_CHECKING:
    AnyStageConfig = StageConfig
else:
    AnyStageConfig = Annotated[reduce(or_, (stage.config_type for stage in STAGES)), Field(discriminator="kind")]


def is_stage_name(name: str) -> bool:
    """Whether a stage may have this name."""
    return name.replace("-", "").replace("_", "").isalnum() and name.isascii() and len(name) <= 40


class ClusterConfig(StrictConfig):
    """The Ray cluster that does the work."""

    address: str = Field(
        "local",
        description="`local` starts a cluster on this machine for the run; `auto` joins the one running here; "
        "else a Ray address such as ray://head:10001.",
    )
    num_cpus: int | None = Field(
        None,
        ge=1,
        description="CPU slots of a `local` cluster; left out: as many as the stages ask for, at least the cores.",
    )


class PipelineConfig(StrictConfig):
    """A named set of stages that form a directed acyclic graph through `needs`."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$",
        description="Name of the pipeline: lower-case letters, digits, `-`, `_`, `.`; run ids begin with it.",
    )
    storage: str = Field(
        "runs",
        min_length=1,
        description="Where artifacts and run state live: a path or any fsspec URL (s3://bucket/prefix, gs://...).",
    )
    tracking: TrackingConfig = Field(
        default_factory=MlflowConfig, description="Where runs are shown: one tracker or a list."
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Ray.")
    stages: dict[str, AnyStageConfig] = Field(min_length=1, description="The stages by name.")

    @field_validator("storage")
    @classmethod
    def _no_variables(cls, storage: str) -> str:
        if "$" in storage:
            raise FieldError(
                ("storage",),
                f"found {storage!r}; variables are not replaced here. Write the path out, begin it with ~, or give "
                'it in the shell: storage="$HOME/runs".',
            )
        return storage

    @field_validator("stages")
    @classmethod
    def _names_can_be_folders(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        for name in stages:
            if not is_stage_name(name):
                raise FieldError(("stages", name), STAGE_NAMES)
        return stages

    @model_validator(mode="after")
    def _graph_is_sound(self) -> PipelineConfig:
        self.graph()
        return self

    def graph(self) -> list[AnyNode]:
        """The stages with what each reads, every one after those. Raises as stage_graph."""
        return stage_graph(self.stages, STAGES)

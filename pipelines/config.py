"""The pipeline file as one strict pydantic tree. Each kind of stage owns its part; this module composes them.

name: quickstart
storage: runs
stages:
  tokenizer: {kind: tokenizer, ...}
  tokens:    {kind: tokenize, needs: [tokenizer], ...}
  train:     {kind: train, needs: [tokens], ...}
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pipelines.engine.graph import validate_graph
from pipelines.engine.stage import StageConfig, StrictConfig
from pipelines.errors import FieldError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.export.config import ExportStageConfig
from pipelines.stages.report.config import ReportStageConfig
from pipelines.stages.tokenize.stage import TokenizeStageConfig
from pipelines.stages.tokenizer.stage import TokenizerStageConfig
from pipelines.stages.train.config import TrainStageConfig, check_train_against_tokenize

AnyStageConfig = Annotated[
    TokenizerStageConfig
    | TokenizeStageConfig
    | TrainStageConfig
    | EvaluateStageConfig
    | ReportStageConfig
    | ExportStageConfig,
    Field(discriminator="kind"),
]

# For each kind: the kinds it reads, with the least and greatest number of each (None: any number).
NEEDS_OF_KIND: dict[str, dict[str, tuple[int, int | None]]] = {
    "tokenizer": {},
    "tokenize": {"tokenizer": (1, 1)},
    "train": {"tokenize": (1, 1), "train": (0, 1)},
    "evaluate": {"train": (1, 1), "tokenize": (1, 1)},
    "report": {"train": (0, None), "evaluate": (1, None)},
    "export": {"train": (1, 1)},
}


class TrackingConfig(StrictConfig):
    """Where runs are shown. Training never waits for the tracking server: see docs/design/0004."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI. Left out: MLFLOW_TRACKING_URI where set, else SQLite under `storage`.",
    )
    experiment: str = Field("bmojo", min_length=1, description="MLflow experiment that the runs belong to.")
    system_metrics: bool = Field(True, description="Log CPU, memory and disk use of the driver's machine.")


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
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow.")
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
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii() or len(name) > 40:
                raise FieldError(
                    ("stages", name),
                    "the name of a stage is the name of a folder: use at most 40 ASCII letters, digits, `-` and `_`.",
                )
        return stages

    @model_validator(mode="after")
    def _graph_is_sound(self) -> PipelineConfig:
        validate_graph({name: stage.needs for name, stage in self.stages.items()})
        for name, stage in self.stages.items():
            self._check_needed_kinds(name, stage)
            if isinstance(stage, TrainStageConfig):
                self._check_train(name, stage)
            if isinstance(stage, EvaluateStageConfig):
                self._check_evaluate(name, stage)
            if isinstance(stage, ReportStageConfig):
                self._check_report(name, stage)
        return self

    def _check_needed_kinds(self, name: str, stage: StageConfig) -> None:
        allowed = NEEDS_OF_KIND[stage.kind]
        counts = dict.fromkeys(allowed, 0)
        for needed in stage.needs:
            found = self.stages[needed].kind
            if found not in allowed:
                raise FieldError(
                    ("stages", name, "needs"),
                    f"{needed!r} is a {found} stage; a {stage.kind} stage reads "
                    f"{' and '.join(allowed) or 'no other stage'}. Take it out of `needs`.",
                )
            counts[found] += 1
        for kind, (least, most) in allowed.items():
            if counts[kind] < least or (most is not None and counts[kind] > most):
                expected = (
                    f"exactly {least}" if least == most else f"at least {least}" if most is None else f"at most {most}"
                )
                there = [other for other, config in self.stages.items() if config.kind == kind and other != name]
                raise FieldError(
                    ("stages", name, "needs"),
                    f"found {counts[kind]} stages of kind {kind}, expected {expected}. "
                    f"This pipeline's {kind} stages: {', '.join(there) or 'none'}.",
                )

    def _check_train(self, name: str, stage: TrainStageConfig) -> None:
        for needed in stage.needs:
            tokenize = self.stages[needed]
            if isinstance(tokenize, TokenizeStageConfig):
                check_train_against_tokenize(stage, tokenize, name, needed)

    def _check_evaluate(self, name: str, stage: StageConfig) -> None:
        for needed in stage.needs:
            tokenize = self.stages[needed]
            if isinstance(tokenize, TokenizeStageConfig) and not tokenize.validation_fraction:
                raise FieldError(
                    ("stages", needed, "validation_fraction"),
                    f"is 0, so {name!r} has nothing to evaluate on. Set it above 0 (0.01 keeps a hundredth of the "
                    "documents).",
                )

    def _check_report(self, name: str, stage: StageConfig) -> None:
        """A report shows a model's training beside its evaluation."""
        for needed in stage.needs:
            for train in self.stages[needed].needs if self.stages[needed].kind == "evaluate" else ():
                if self.stages[train].kind == "train" and train not in stage.needs:
                    raise FieldError(
                        ("stages", name, "needs"),
                        f"has {needed!r} but not {train!r}, the train stage it evaluates. Add {train!r}.",
                    )

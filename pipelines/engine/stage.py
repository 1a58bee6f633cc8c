"""What a stage is: a pure function of (its config, its inputs' records, an output directory).

The engine (pipelines/engine) knows only these types; each kind of stage lives in its own module beside this one.
Why it is so: docs/design/0002 and 0003.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pipelines.storage.artifact import ArtifactDir
    from pipelines.tracking.journal import Journal

NOT_IN_FINGERPRINT: dict[str, Any] = {"affects_result": False}
"""Pass as `json_schema_extra` to mark a field that cannot change a stage's result (resources, logging, ...)."""


class StrictConfig(BaseModel):
    """Unknown keys are errors; nothing is written into a config after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Resources(StrictConfig):
    """What a stage asks of the Ray cluster. Never part of a fingerprint."""

    num_workers: int = Field(
        1, ge=1, description="Processes that work side by side (training workers, tokenize tasks)."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores each worker reserves.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs each worker reserves; 0 runs on the CPU.")
    placement_timeout_s: float = Field(
        300, gt=0, description="Seconds to wait for the cluster to grant the above before giving up with an error."
    )


class StageConfig(StrictConfig):
    """Fields every kind of stage has. `kind` is narrowed to a Literal by each subclass."""

    kind: str = Field(description="What the stage does.")
    needs: tuple[str, ...] = Field(
        (), description="Names of the stages whose results this one reads.", json_schema_extra=NOT_IN_FINGERPRINT
    )
    resources: Resources = Field(
        default_factory=Resources, description="What it asks of the cluster.", json_schema_extra=NOT_IN_FINGERPRINT
    )

    def settled(self) -> dict[str, Any]:
        """Values to hash instead of this config's own, where what is used also depends on fields that do not count."""
        return {}


class Facts(StrictConfig):
    """What was found, other than what was asked for: any number can be, also NaN and the infinities."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")


class StageOutput(Facts):
    """Small frozen facts a stage returns; the engine stores them in the artifact's record.json, written last."""

    def summary(self) -> str | None:
        """What `bmojo status` says about it in one line; None where there is nothing to add."""
        return None

    def figures(self) -> dict[str, float]:
        """The final figures that runs are compared by, under their names in MLflow."""
        return {}


@dataclass(frozen=True)
class StageInput:
    """A finished stage that another one reads."""

    name: str
    kind: str
    fingerprint: str
    artifact: ArtifactDir
    config: StageConfig
    output: StageOutput
    inputs: Mapping[str, StageInput] = field(default_factory=dict)  # what it read itself, by stage name


@dataclass(frozen=True)
class StageContext:
    """Where a stage reads, writes and tells of its progress."""

    name: str
    fingerprint: str
    artifact: ArtifactDir
    inputs: Mapping[str, StageInput]  # by stage name, in the order of `needs`
    journal: Journal
    content: str | None = None  # the content_identity of the raw inputs that the fingerprint was computed with

    def inputs_of(self, kind: str) -> list[StageInput]:
        """The inputs of one kind, in the order of `needs`."""
        return [stage_input for stage_input in self.inputs.values() if stage_input.kind == kind]


class Stage(Protocol):
    """One kind of stage."""

    kind: ClassVar[str]
    code_version: ClassVar[int]  # raise it when the same config would give another result
    output_type: ClassVar[type[StageOutput]]

    def content_identity(self, config: Any) -> str | None:
        """Digest of the raw inputs outside the storage that the config names (text files); None where there are none.

        Raises ConfigError/FileNotFoundError early, before anything is written, when such an input is missing.
        """

    def run(self, config: Any, context: StageContext) -> StageOutput:
        """Do the work under `context.artifact`; called again after a crash, it carries on from what is there."""

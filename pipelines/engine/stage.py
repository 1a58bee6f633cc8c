"""The contract between the engine, which plans and runs stages, and the kinds of stage in pipelines/stages/<kind>/.

| word             | meaning                                                                                       |
|------------------|-----------------------------------------------------------------------------------------------|
| kind             | what a stage does: `train`                                                                    |
| Stage            | the object that owns all that is known about a kind; pipelines.stages.STAGES lists them       |
| StageConfig      | the settings of one stage in a pipeline file                                                  |
| StageInputs      | what stages of a kind read: a field per role                                                  |
| StageNode        | one stage in the graph of a pipeline: name, kind, settings, what it reads, and its result     |
| PlannedStage     | a node and what a run would do with it (pipelines.engine.plan)                                |

A stage is a pure function of (its settings, its inputs' results, an output directory): docs/design/0002 and 0003.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from base.config import NOT_IN_FINGERPRINT, StrictConfig
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal


class Resources(StrictConfig):
    """Resources that a stage asks of the Ray cluster. Never part of a fingerprint."""

    num_workers: int = Field(
        1, ge=1, description="Processes that work side by side (training workers, tokenize tasks)."
    )
    min_workers: PositiveInt | None = Field(
        None,
        description="Training only: the fewest workers that it may go on with where the cluster has no room for "
        "num_workers, which are the most; null: all of them.",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores each worker reserves.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs each worker reserves; 0 runs on the CPU.")
    neuron_cores_per_worker: float = Field(0, ge=0, description="AWS NeuronCores each worker reserves.")
    custom_per_worker: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="Custom resources of the cluster each worker reserves, by name."
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels that a worker's node must have, as in `ray start --labels`: {market-type: on-demand}.",
    )
    placement_timeout_s: float = Field(
        300, gt=0, description="Seconds to wait for the cluster to grant the above before giving up with an error."
    )

    @model_validator(mode="after")
    def _fewest_is_at_most_most(self) -> Resources:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than num_workers={self.num_workers}, which are the most. "
                "Lower it, or raise num_workers."
            )
        return self

    @property
    def fewest_together(self) -> int:
        """Workers that must fit at once, of a kind whose workers work together."""
        return self.min_workers or self.num_workers

    def bundle(self) -> dict[str, float]:
        """Resources that one worker reserves, as Ray names them."""
        asked = {
            "CPU": self.cpus_per_worker,
            "GPU": self.gpus_per_worker,
            "neuron_cores": self.neuron_cores_per_worker,
            **self.custom_per_worker,
        }
        return {name: float(amount) for name, amount in asked.items() if amount}

    def without_accelerators(self) -> Resources:
        """For work in one thread that needs none: a core beside the accelerators; if there are none, the same."""
        if not self.gpus_per_worker and not self.neuron_cores_per_worker:
            return self
        cpus = min(1.0, self.cpus_per_worker)
        return self.model_copy(
            update={"gpus_per_worker": 0, "neuron_cores_per_worker": 0, "cpus_per_worker": cpus, "num_workers": 1}
        )


def _check_form(needs: Any) -> Any:
    """Refuse what is neither a list of names nor a mapping of roles to names."""
    if isinstance(needs, list | tuple):
        _check_names(needs)
    elif isinstance(needs, dict):
        for role, names in needs.items():
            _check_names(names if isinstance(names, list | tuple) else [names], f"{role}: ")
    else:
        raise PydanticCustomError("needs_type", "expected a list of names, or a mapping of roles to names")
    return needs


def _check_names(names: Sequence[Any], where: str = "") -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}found {name!r}, expected the name of a stage.")


Needs = Annotated[tuple[str, ...] | dict[str, str | tuple[str, ...]], BeforeValidator(_check_form)]


class StageConfig(StrictConfig):
    """Fields every kind of stage has. `kind` is narrowed to a Literal by each subclass."""

    kind: str = Field(description="What the stage does.")
    needs: Needs = Field(
        (),
        description="Names of the stages whose results this one reads: a list, or a name per role.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    resources: Resources = Field(
        default_factory=Resources, description="What it asks of the cluster.", json_schema_extra=NOT_IN_FINGERPRINT
    )
    retries: int = Field(
        0,
        ge=0,
        description="Times that the stage is started again after an error or a time-out, counted from 0 again "
        "whenever it got further. Errors in your input or configuration are never retried.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    lost_retries: int = Field(
        10,
        ge=0,
        description="The same for lost processes, machines and connections to the cluster, which are nobody's error.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    backoff_s: float = Field(
        1.0,
        ge=0,
        description="Seconds before the first of these attempts; doubled for each one more, up to 5 minutes.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="Seconds that one attempt may take; then it is stopped, which counts as an error. null: no limit.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    on_failure: Literal["continue", "stop"] = Field(
        "continue",
        description="If it fails for good: continue with the stages that do not need it, or stop the whole run.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )

    @property
    def needed(self) -> tuple[str, ...]:
        """The names in `needs`, in the order in which they are written."""
        if not isinstance(self.needs, dict):
            return self.needs
        return tuple(name for names in self.needs.values() for name in ((names,) if isinstance(names, str) else names))

    def settled(self) -> dict[str, Any]:
        """Values to hash instead of this config's own, if what is used also depends on fields that do not count."""
        return {}


class Facts(StrictConfig):
    """Facts found, as opposed to settings asked for: any number is allowed, also NaN and the infinities."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")


class StageOutput(Facts):
    """Small frozen facts a stage returns; the engine stores them in the artifact's record.json, written last."""

    def summary(self) -> str | None:
        """One line for `bmojo status`; None if there is nothing to add."""
        return None

    def figures(self) -> dict[str, float]:
        """The final figures that runs are compared by, under their names in MLflow."""
        return {}


@dataclass(frozen=True)
class StageInputs:
    """Inputs of the stages of a kind. Subclasses are frozen dataclasses with a field per role:

    `StageNode[Other]` for exactly one stage of kind Other, `StageNode[Other] | None = None` for at most one,
    `tuple[StageNode[Other], ...]` for one or more; with the default `()`, for any number.
    """


@dataclass(frozen=True)
class NamedInputs(StageInputs):
    """Inputs of a kind that reads stages of any kind, under names that each pipeline file chooses.

    `needs: {name: stage}` gives one stage, `needs: {name: [stage, ...]}` a tuple. In a list each goes by its own name.
    """

    by_name: Mapping[str, AnyNode | tuple[AnyNode, ...]] = field(default_factory=dict)


Content = str | dict[str, str]
"""Digest of what a stage reads outside the storage; or digests by what they are of, so that a plan names the change."""


@dataclass(frozen=True)
class StageContext:
    """Output directory and journal of a running stage."""

    name: str
    fingerprint: str
    artifact: ArtifactDir
    journal: Journal
    content: Content | None = None  # the content_identity that the fingerprint was computed with
    attempt: int = 1  # of this owner of the run
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the attempt must end soon. Only stages with `stops_in_order` have to look."""
    run_id: str | None = None  # of the run that does this work; None: it is done outside of any


@dataclass(frozen=True)
class ProgressMetrics:
    """Metrics that show how far a stage is. A metric's step counts what is done."""

    total: str  # the metric that holds the number of steps
    shown: Mapping[str, str]  # metric -> format of its value beside the bar


def tells_progress(values: Mapping[str, float]) -> bool:
    """Whether the step of these metrics says how far a stage is: those of the machine are sampled by the clock."""
    return not all(name.startswith("system/") for name in values)


@dataclass(frozen=True)
class Machines:
    """What a plan is made for.

    num_cores: that the workers can have together, at most.
    hardware: name of the GPU that each training worker gets, whatever the file asks for; None: what the file asks for.
    price_per_hour: of one worker's device; None: costs are not asked for.
    measure: take real steps on this machine first, and measure again what was measured before.
    """

    num_cores: float
    hardware: str | None = None
    price_per_hour: float | None = None
    measure: bool = False


@dataclass(frozen=True)
class Estimate:
    """A table for `bmojo plan`: what the stages of a kind take."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ClosedGate:
    """Why nothing may go on from a stage's result, which is there and stays.

    Attributes:
        fails: whether the stage counts as failed; else it succeeded, and the run ends as STOPPED.
    """

    reason: str
    fails: bool


Config = TypeVar("Config", bound=StageConfig)
Inputs = TypeVar("Inputs", bound=StageInputs)
Output = TypeVar("Output", bound=StageOutput)


class Stage(ABC, Generic[Config, Inputs, Output]):
    """One kind of stage. Subclass it with its three types, and add an instance to pipelines.stages.STAGES."""

    kind: ClassVar[str]  # this and the next three are taken from the subclass's types
    config_type: ClassVar[type[StageConfig]]
    inputs_type: ClassVar[type[StageInputs]]
    output_type: ClassVar[type[StageOutput]]

    code_version: ClassVar[int]  # raise it when the same config would give another result
    progress: ClassVar[ProgressMetrics | None] = None
    uses_cluster: ClassVar[bool] = True  # False: all work is done in the stage's own process
    uses_ray_train: ClassVar[bool] = False  # all workers run at once
    stops_in_order: ClassVar[bool] = False  # `run` looks at context.stop, and saves its work before it ends

    def __init_subclass__(cls) -> None:
        for base in vars(cls).get("__orig_bases__", ()):
            if get_origin(base) is Stage:
                cls.config_type, cls.inputs_type, cls.output_type = get_args(base)
                (cls.kind,) = get_args(cls.config_type.model_fields["kind"].annotation)

    def content_identity(self, config: Config) -> Content | None:
        """Digest of what the config names outside the storage (text files, source code); None if there is nothing.

        Raises ConfigError/FileNotFoundError early, before anything is written, when such an input is missing.
        """
        return None

    def local_paths(self, config: Config) -> Sequence[str]:
        """Files and folders of this machine that `run` reads: as the config names them, also with wildcards."""
        return ()

    def code_files(self, config: Config) -> Sequence[Path]:
        """Files with the user's code that `run` needs. Raises UserError: one is missing or invalid."""
        return ()

    def check(self, name: str, config: Config, inputs: Inputs) -> None:
        """Refuse settings of the stage `name` that do not fit those of its inputs, which have no results yet.

        Raises: FieldError: names the field, what was found and what would do.
        """
        return None

    @abstractmethod
    def run(self, config: Config, inputs: Inputs, context: StageContext) -> Output:
        """Do the work under `context.artifact`; called again after a crash, it resumes from what is there.

        It runs in the main thread of a process of its own. There SIGTERM raises Terminated; if `stops_in_order`, the
        first one sets `context.stop` instead.
        """

    def mark(self, config: Config, artifact: ArtifactDir) -> int:
        """A number that has grown if the stage got further, as seen by an attempt that resumes it.

        Attempts that get further have their retries counted from 0 again.
        """
        return 0

    def headline(self, config: Config, output: Output, artifact: ArtifactDir) -> str | None:
        """The result in one line of console markup, for the end of a run; None if there is nothing to say."""
        return None

    def closed_gate(self, config: Config, output: Output) -> ClosedGate | None:
        """Judge a result, each time that a run takes it, made or reused. None: stages that need it may start.

        So the settings that it reads cannot change the result, and need not be part of the fingerprint.
        """
        return None

    def estimate(self, stages: Sequence[StageNode[Self]], machines: Machines) -> Sequence[Estimate]:
        """What all the stages of this kind in a pipeline take, from settings alone; nothing: it is not known.

        Raises: UserError: the machines are not known, or their measurement failed.
        """
        return ()

    def check_memory(self, node: StageNode[Self], machines: Machines) -> None:
        """Refuse work that the machines cannot hold; a note in the log if it will be close.

        machines.hardware None: it is about this machine.
        Raises: FieldError: what is needed for certain is more than there is, and what would help.
        """
        return None


AnyStage = Stage[Any, Any, Any]
Kind = TypeVar("Kind", bound=AnyStage, covariant=True)


@dataclass(frozen=True)
class StageResult(Generic[Output]):
    """A finished stage's result."""

    fingerprint: str
    artifact: ArtifactDir
    output: Output


class StageNode(Generic[Kind]):
    """One stage in the graph of a pipeline; its settings, inputs and result have the types of its kind."""

    def __init__(
        self,
        name: str,
        stage: Kind,
        config: StageConfig,
        inputs: StageInputs,
        result: StageResult[Any] | None = None,
    ) -> None:
        self.name = name
        self.stage = stage
        self._config, self._inputs, self._result = config, inputs, result

    def __repr__(self) -> str:
        return f"StageNode({self.name!r}, kind={self.stage.kind!r}, finished={self._result is not None})"

    @property
    def config(self: StageNode[Stage[Config, Inputs, Output]]) -> Config:
        """Its settings."""
        return self._config  # type: ignore[return-value]  # stage_graph() puts the right ones in; so below

    @property
    def inputs(self: StageNode[Stage[Config, Inputs, Output]]) -> Inputs:
        """The stages it reads, by role."""
        return self._inputs  # type: ignore[return-value]

    @property
    def result(self: StageNode[Stage[Config, Inputs, Output]]) -> StageResult[Output]:
        """Its result, which is there when the stages that read it run. Raises RuntimeError: not while planning."""
        if self._result is None:
            raise RuntimeError(f"stage {self.name!r} has not finished: only its settings are known")
        return self._result

    @property
    def output(self: StageNode[Stage[Config, Inputs, Output]]) -> Output:
        """The facts in its record. Raises as `result`."""
        return self.result.output

    @property
    def artifact(self) -> ArtifactDir:
        """Its output directory. Raises as `result`."""
        return self.result.artifact

    @property
    def fingerprint(self) -> str:
        """The identity of its result, in hexadecimal. Raises as `result`."""
        return self.result.fingerprint


AnyNode = StageNode[AnyStage]

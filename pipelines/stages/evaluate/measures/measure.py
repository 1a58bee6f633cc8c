"""The contract between the `evaluate` stage and its measures: MEASURES (in this folder's __init__) lists them.

| word        | meaning                                                                                            |
|-------------|----------------------------------------------------------------------------------------------------|
| kind        | what is measured: `text`                                                                           |
| Measure     | the object that owns all that is known about a kind                                                |
| Task        | a piece of a measure's work; its result is kept, so that a killed evaluation repeats none          |
| Work        | what a task does, in an actor                                                                      |
| Host        | what the work finds there: model, tokenizer, tokens (pipelines.stages.evaluate.host)               |
| Setting     | what a measure knows about the evaluation                                                          |
| Measured    | what it found: a MeasureResult and the sums of each unit                                           |

A module here loads no numpy and no torch, since every command reads settings: what needs them is in the module
`<kind>_work` beside it, imported by `tasks` and `reduce`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_origin

from pydantic import Field

from base.config import StrictConfig
from pipelines.engine.stage import Content, Resources, StageNode
from pipelines.stages.evaluate.results import MeasureResult
from pipelines.stages.tokenize.stage import TokenizeStage
from pipelines.stages.train.stage import TrainStage

if TYPE_CHECKING:
    import numpy as np

    from pipelines.stages.evaluate.config import EvaluateStageConfig
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.uncertainty import Ratio

    TaskResult = Mapping[str, np.ndarray]
    """Arrays by name, of numbers and of unicode text; no objects, so that they are read without pickle."""


class MeasureConfig(StrictConfig):
    """Fields every measure has. `kind` is narrowed to a Literal by each subclass."""

    kind: str = Field(description="What is measured.")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-]{1,40}$",
        description="Its name in figures, such as text/loss; left out: the kind. Two measures of a kind need names.",
    )

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.kind


@dataclass(frozen=True)
class Setting:
    """What a measure knows about the evaluation.

    Attributes:
        config: the stage's settings: batch size, precision, resources.
        stage: its name.
        tokens: the texts that the model is evaluated on. Their outputs are there from `tasks` on, not in `check`.
        trained: the stage that trained the model; None: it comes from elsewhere.
    """

    config: EvaluateStageConfig
    stage: str
    tokens: tuple[StageNode[TokenizeStage], ...]
    trained: StageNode[TrainStage] | None

    @property
    def seq_len(self) -> int:
        """Length of the sequences of these texts, in tokens."""
        return self.tokens[0].config.seq_len

    @property
    def training_seq_len(self) -> int:
        """Length of the sequences that the model was trained on; if it is not known, of those of the texts."""
        tokens = self.tokens if self.trained is None else self.trained.inputs.tokens
        return tokens[0].config.seq_len

    @property
    def reads_ids(self) -> bool:
        """Whether the model reads the ids of these texts; otherwise it has a tokenizer of its own."""
        return self.config.model is None

    @property
    def is_text(self) -> bool:
        """Whether the tokens are text, so that there is a tokenizer."""
        return self.tokens[0].inputs.tokenizer is not None or self.tokens[0].config.source.kind == "bytes"

    @property
    def has_loss_mask(self) -> bool:
        """Whether only answers count, as in a task."""
        vocabulary = self.tokens[0].config.source.vocabulary
        return vocabulary is not None and vocabulary.has_loss_mask


class Work(Protocol):
    """What a task does: a small picklable frozen dataclass."""

    def run(self, host: Host) -> TaskResult:
        """Do it, in an actor. Gives the same wherever and however often it is done, but for times."""


class Turn(IntEnum):
    """When a task begins, as far as actors are free."""

    EARLY = 0  # long: the others fill the actors beside it
    ANY = 1
    LATE = 2  # it needs another model in the place of the one that is evaluated


@dataclass(frozen=True)
class Task:
    """A piece of work. `key`: names it within the measure, the same in every attempt; names the file of its result."""

    key: str
    work: Work
    resources: Resources
    turn: Turn = Turn.ANY


@dataclass(frozen=True)
class Units:
    """Sums of each document, example or window: what intervals are estimated from, and pairs of models compared by.

    Attributes:
        identity: digest of what the units are, in their order: if two models' are equal, they can be compared in pairs.
        ratios: by the figure's name.
    """

    identity: str
    ratios: Mapping[str, Ratio]


@dataclass(frozen=True)
class Measured:
    """What a measure found, and the sums behind it."""

    result: MeasureResult
    units: Units | None = None


Config = TypeVar("Config", bound=MeasureConfig)


class Measure(ABC, Generic[Config]):
    """One kind of measure. Subclass it with the type of its settings, and add an instance to MEASURES."""

    kind: ClassVar[str]  # this and the next one are taken from the subclass's type
    config_type: ClassVar[type[MeasureConfig]]

    def __init_subclass__(cls) -> None:
        for base in vars(cls).get("__orig_bases__", ()):
            if get_origin(base) is Measure:
                (cls.config_type,) = get_args(base)
                (cls.kind,) = get_args(cls.config_type.model_fields["kind"].annotation)

    def check(self, config: Config, setting: Setting) -> None:
        """Refuse settings that do not fit, before anything starts.

        Raises: FieldError: its field is relative to the measure, such as ("multiple",).
        """
        return None

    def figure_names(self, config: Config, setting: Setting) -> frozenset[str] | None:
        """Names of all figures that it may find, for the check of gates; None: they are not known before."""
        return None

    def local_paths(self, config: Config) -> Sequence[str]:
        """Files and folders of this machine that it reads: as the config names them, also with wildcards."""
        return ()

    def content(self, config: Config) -> Content | None:
        """Digest of what the config names outside the storage; None if there is nothing."""
        return None

    @abstractmethod
    def tasks(self, config: Config, setting: Setting) -> list[Task]:
        """The work, cut the same for any number of workers. Empty: the measure does not apply to these tokens."""

    @abstractmethod
    def reduce(self, config: Config, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """What the results of all tasks, by key in the order of `tasks`, amount to."""


AnyMeasure = Measure[Any]

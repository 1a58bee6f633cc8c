"""What a training reads: its sources, how they are mixed, and how their shards come to the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from base.config import NOT_IN_FINGERPRINT, StrictConfig
from base.errors import UserError
from pipelines.errors import FieldError
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from data.mixture import Mixture
    from pipelines.stages.train.config import TrainStageConfig

GIB = 1 << 30
Weights = dict[str, Annotated[float, Field(ge=0)]]


class CurriculumPhase(StrictConfig):
    """Weights that count from a step on."""

    from_step: PositiveInt = Field(description="The first step that is taken with these weights.")
    weights: Weights = Field(description="As data.weights.")


class TrainDataConfig(StrictConfig):
    """Which tokens training reads in which order, and how they come to the workers."""

    weights: Weights | None = Field(
        None,
        description="Share of each `tokenize` stage in `needs`, by its name: numbers of few digits, which need not add "
        "up to 1. Shares are exact: after any number of sequences each source has had its part to less than one "
        "sequence. Needed where there are several.",
    )
    curriculum: tuple[CurriculumPhase, ...] = Field(
        (), description="Other weights from later steps on, in the order of the steps."
    )
    max_repetition: float = Field(
        4.0,
        gt=0,
        description="Refuse to read a source of a mixture more often than this in the course of training.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )
    shuffle_block_samples: PositiveInt = Field(
        1 << 16,
        description="Sequences that are shuffled among each other, in shards that follow each other at random. More "
        "need more shards at a time.",
    )
    paths: PositiveInt = Field(
        1,
        description="Stretches of the data that are read side by side. With one per machine each machine fetches only "
        "its own shards; a divisor of global_batch_size. Part of the order of samples: keep it when machines change.",
    )
    cache_bytes: int = Field(
        64 * GIB,
        ge=1 << 20,
        description="Room on each machine for shards fetched from an object store; the oldest make room for new ones.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )

    @model_validator(mode="after")
    def _phases_follow_each_other(self) -> TrainDataConfig:
        steps = [phase.from_step for phase in self.curriculum]
        if steps != sorted(set(steps)):
            raise ValueError(f"curriculum: from_step {steps}: each must be greater than the one before.")
        if self.curriculum and self.weights is None:
            raise ValueError("curriculum needs weights, which count before its first step.")
        return self

    def phases(self) -> list[tuple[int, Weights]]:
        """(first step, weights) of each phase; none without a mixture."""
        if self.weights is None:
            return []
        return [(0, self.weights), *((phase.from_step, phase.weights) for phase in self.curriculum)]


class TokenSource(NamedTuple):
    """The output of a `tokenize` stage, as a training reads it."""

    name: str
    artifact: ArtifactDir
    num_samples: int
    has_validation: bool


def check_mixture(config: TrainStageConfig, stage: str, sources: Sequence[str]) -> None:
    """Refuse weights that do not name the sources. Raises FieldError."""
    path = ("stages", stage, "data", "weights")
    if config.data.weights is None:
        if len(sources) > 1:
            example = ", ".join(f"{name}: 1" for name in sources)
            raise FieldError(
                path,
                f"is missing: {stage} reads {len(sources)} tokenize stages. Set it to {{{example}}}.",
            )
        return
    for _, weights in config.data.phases():
        if set(weights) != set(sources):
            raise FieldError(
                path,
                f"found {', '.join(weights) or 'none'}, expected one weight for each tokenize stage in needs: "
                f"{', '.join(sources)}.",
            )


def mixture_of(
    config: TrainStageConfig, sources: Sequence[TokenSource], num_steps: int, first_position: int = 0
) -> Mixture:
    """The source of each position of training. Raises UserError: a source would be read too often.

    Args: first_position: in the data, of the first step.
    """
    from data.mixture import Mixture, Phase, shares_of

    if config.data.weights is None:
        return Mixture.of_one()
    phases, batches = [], config.batches(first_position)
    for step, weights in config.data.phases():
        shares = shares_of(weights)
        start = batches.start(step) if step else 0
        phases.append(Phase(start, tuple(shares[source.name] for source in sources)))
    mixture = Mixture(phases)
    for source, count in zip(sources, mixture.counts(batches.start(num_steps)), strict=True):
        if count > config.data.max_repetition * source.num_samples:
            raise UserError(
                f"{source.name} holds {source.num_samples:,} sequences and would be read "
                f"{count / source.num_samples:.1f} times in {num_steps:,} steps, more than "
                f"data.max_repetition={config.data.max_repetition:g}. Lower its weight or max_steps, give it more "
                "text, or raise data.max_repetition."
            )
    return mixture


def final_weights(config: TrainStageConfig) -> Mapping[str, float] | None:
    """The weights at the end of training; None without a mixture."""
    phases = config.data.phases()
    return phases[-1][1] if phases else None

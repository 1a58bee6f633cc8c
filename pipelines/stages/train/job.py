"""What the driver hands to every training worker: settings, paths and handles; never data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from bmojo import ModelConfig
from data.batches import Batches
from pipelines.engine.stage import Facts
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.data import TokenSource
from pipelines.stages.train.start import Start
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.request import Request

if TYPE_CHECKING:
    from data.mixture import Mixture
    from pipelines.stages.train.guards.watchdog import BoardHandle

History = dict[str, list[tuple[int, float]]]
"""For each metric, its points (step, value)."""


class MetricSink(Protocol):
    """The part of the journal that a worker uses."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step; steps already recorded are skipped."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Record texts that may change in the course of a run; those already recorded are skipped."""

    def log_notice(self, text: str) -> None:
        """Record a line for whoever watches the run; one already recorded is skipped."""

    def flush(self) -> bool:
        """Return True when everything recorded before is durable; False if that failed and it is kept for later."""

    def request(self) -> Request:
        """What the workers are asked to do. Does not wait."""

    def ask(self, request: Request) -> None:
        """Ask the workers; for the stage's process."""


@dataclass(frozen=True)
class TrainJob:
    """One training run, the same for all its workers and attempts but for `resume_step`."""

    config: TrainStageConfig
    model: ModelConfig  # with vocab_size
    num_steps: int
    seq_len: int
    artifact: ArtifactDir  # checkpoints/ and model/ go here
    sources: tuple[TokenSource, ...]
    mixture: Mixture  # of the sources
    start: Start | None  # what to take from another train stage; None: new weights
    resume_step: int | None  # the checkpoint to go on from
    metrics: MetricSink  # used on rank 0
    board: BoardHandle | None = None  # where workers tell how far they are

    @property
    def batches(self) -> Batches:
        """The positions in the data that each step reads."""
        return self.config.batches(self.start.first_position if self.start is not None else 0)


class TrainFigures(Facts):
    """Results of training. Losses are in nats per token; null without a validation split."""

    num_params: int
    steps: int
    tokens_seen: int
    skipped_steps: tuple[int, ...] = Field(
        (), description="Steps that were left out: not finite, or loss spikes (max_skipped_steps)."
    )
    final_train_loss: float
    initial_valid_loss: float | None = Field(description="Before the first step.")
    final_valid_loss: float | None
    averaged_valid_loss: float | None = Field(
        None, description="Of the moving average of the weights, which the final model is; null without ema_decay."
    )
    train_time_s: float = Field(description="Seconds spent in optimizer steps, over all attempts.")
    tokens_per_s: float = Field(description="Over all workers, while in optimizer steps.")
    mfu: float | None = Field(
        description="Model FLOP/s as a share of the devices' matrix-product peak; null if that peak is not known."
    )
    peak_flops: float | None = Field(
        None,
        description="That peak, in FLOP/s, of all workers together: by the GPU's data sheet in bf16, else measured.",
    )
    mfu_of_measured: float | None = Field(
        None, description="The same as a share of the peak that was measured at the start of training."
    )
    measured_peak_flops: float | None = Field(None, description="That measured peak.")
    devices: str = Field("", description="What the workers computed on: `2 x NVIDIA H100`.")


class TrainFacts(TrainFigures):
    """Report of the workers when training is done."""

    history: History

"""The `train` stage: DeepSpeed under Ray Train, resumed from its own checkpoints after any crash."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from pipelines.engine.stage import StageContext, StageInput, StageOutput
from pipelines.errors import UserError
from pipelines.stages.train.config import TrainStageConfig, check_train_against_tokenize

if TYPE_CHECKING:
    from bmojo import ModelConfig
    from pipelines.stages.train.job import MetricSink, TrainFacts, TrainJob

HISTORY = "history.json"
_FAR_WORSE = 1.1  # times the validation loss before the first step
VOCAB_MULTIPLE = 64  # rows of the embedding are padded to this: matrix products like round sizes


logger = logging.getLogger(__name__)


class TrainOutput(StageOutput):
    """A trained model and how it got there. Losses are in nats per token."""

    model: str = Field(description="Folder of the final model (config.json, model.safetensors) in this artifact.")
    history: str = Field(description="JSON file in this artifact: for each metric its [step, value] points.")
    tokenizer: str = Field(
        description="Folder with the tokenizer that the model was trained with: a path in the storage, or a URL."
    )
    seq_len: int
    vocab_size: int = Field(description="The model's, padded; the tokenizer may have fewer ids.")
    num_params: int
    steps: int
    tokens_seen: int
    final_train_loss: float
    initial_valid_loss: float | None = Field(description="Before the first step; null without a validation split.")
    final_valid_loss: float | None
    train_time_s: float = Field(description="Seconds spent in optimizer steps, over all attempts.")
    tokens_per_s: float = Field(description="Over all workers, while in optimizer steps.")
    mfu: float = Field(description="Model FLOP/s as a share of the devices' matrix-product peak.")

    def figures(self) -> dict[str, float]:
        """At the end of training; speed and MFU are those of the whole training."""
        figures = {
            "train/loss": self.final_train_loss,
            "valid/loss": self.final_valid_loss,
            "train/parameters": self.num_params,
            "train/tokens": self.tokens_seen,
            "train/time_s": self.train_time_s,
            "train/tokens_per_s": self.tokens_per_s,
            "train/mfu": self.mfu,
        }
        return {name: value for name, value in figures.items() if value is not None}


class TrainStage:
    """Training as a stage: all its state is in the artifact's checkpoints/."""

    kind: ClassVar[str] = "train"
    code_version: ClassVar[int] = 5
    output_type: ClassVar[type[StageOutput]] = TrainOutput

    def content_identity(self, config: TrainStageConfig) -> None:
        """All it reads are other stages' artifacts."""

    def run(self, config: TrainStageConfig, context: StageContext) -> TrainOutput:
        """Train to the end, from the newest checkpoint where there is one.

        Raises: UserError: settings that do not fit the data, training that diverges, workers without room.
        """
        from pipelines.stages.train.launch import run_training
        from pipelines.tracking.remote import log_missing, remote_journal, workers_journal

        (tokens,) = context.inputs_of("tokenize")
        tokens_output: Any = tokens.output
        context.journal.log_dataset(tokens.name, tokens_output.train_sha256, tokens.artifact.url, context="train")
        with remote_journal(context.journal) as metrics:
            job = make_job(config, context, metrics)
            facts = run_training(job)
        log_missing(workers_journal(context.journal), facts.history)
        _warn_if_worse(facts, config, context.name)
        context.artifact.write_json(HISTORY, facts.history)
        for path in (HISTORY, "model/config.json"):
            context.journal.log_artifact(path)
        return _output(facts, job.model, context.artifact.reference_to(tokens.artifact, "tokenizer"), tokens)


def _warn_if_worse(facts: TrainFacts, config: TrainStageConfig, name: str) -> None:
    before, after = facts.initial_valid_loss, facts.final_valid_loss
    if before is not None and after is not None and after > _FAR_WORSE * before:
        logger.warning(
            "%s: training made the model worse: validation loss %.4g before the first step, %.4g after the last. Try a "
            "lower lr (now %g) or more warmup_steps (now %d).",
            name, before, after, config.lr, config.warmup_steps,
        )  # fmt: skip


def make_job(config: TrainStageConfig, context: StageContext, metrics: MetricSink) -> TrainJob:
    """What the workers need to know. Raises UserError: the settings do not fit the data."""
    from pipelines.stages.train.job import TrainJob

    (tokens,) = context.inputs_of("tokenize")
    initial = context.inputs_of("train")
    tokens_output: Any = tokens.output
    check_train_against_tokenize(config, tokens_output, context.name, tokens.name)
    return TrainJob(
        config=config,
        model=_sized_model(config, tokens),
        num_steps=config.num_steps(tokens_output.seq_len),
        seq_len=tokens_output.seq_len,
        artifact=context.artifact,
        shards=tokens.artifact,
        has_validation=tokens_output.num_valid_samples > 0,
        initial_weights=initial[0].artifact if initial else None,
        resume_step=None,
        metrics=metrics,
    )


def _output(facts: TrainFacts, model: ModelConfig, tokenizer: str, tokens: StageInput) -> TrainOutput:
    tokens_output: Any = tokens.output
    assert model.vocab_size is not None
    return TrainOutput(
        model="model",
        history=HISTORY,
        tokenizer=tokenizer,
        seq_len=tokens_output.seq_len,
        vocab_size=model.vocab_size,
        num_params=facts.num_params,
        steps=facts.steps,
        tokens_seen=facts.num_tokens,
        final_train_loss=facts.final_train_loss,
        initial_valid_loss=facts.initial_valid_loss,
        final_valid_loss=facts.final_valid_loss,
        train_time_s=facts.train_time_s,
        tokens_per_s=facts.tokens_per_s,
        mfu=facts.mfu,
    )


def padded_vocab_size(num_ids: int) -> int:
    """Rows of the embedding for a tokenizer of `num_ids` ids."""
    return -(-num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _sized_model(config: TrainStageConfig, tokens: StageInput) -> ModelConfig:
    """The model's config with room for every id of the tokenizer."""
    tokens_output: Any = tokens.output
    needed: int = tokens_output.vocab_size
    if config.model.vocab_size is None:
        return config.model.with_vocab_size(padded_vocab_size(needed))
    if config.model.vocab_size < needed:
        raise UserError(
            f"train.model.vocab_size={config.model.vocab_size} is less than the {needed} ids of the tokenizer of stage "
            f"{tokens.name!r}. Leave vocab_size out, or set it to {needed} or more."
        )
    return config.model

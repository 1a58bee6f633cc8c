"""The `train` stage: DeepSpeed under Ray Train, resumed from its own checkpoints after any crash."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import Field

from base.errors import UserError
from bmojo import ModelConfig
from data.config import SyntheticSource
from pipelines.engine.stage import (
    Estimate,
    Machines,
    ProgressMetrics,
    Stage,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.errors import FieldError
from pipelines.stages.sections import Section
from pipelines.stages.tokenize.stage import TokenizeStage, planned_vocab_size
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER
from pipelines.stages.train.config import TrainStageConfig, check_seq_len
from pipelines.stages.train.data import TokenSource, check_mixture, mixture_of
from pipelines.stages.train.job import History, MetricSink, TrainFigures, TrainJob
from pipelines.stages.train.layout import INCIDENTS, PROFILE, RESUMES, complete_steps
from pipelines.stages.train.section import training_section
from pipelines.stages.train.start import check_start, start_of
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import workers_journal

HISTORY = "history.json"
_FAR_WORSE = 1.1  # times the validation loss before the first step
VOCAB_MULTIPLE = 64  # rows of the embedding are padded to this: matrix products like round sizes


logger = logging.getLogger(__name__)


class TrainOutput(StageOutput, TrainFigures):
    """A trained model and how it got there."""

    model: str = Field(description="Folder of the final model (config.json, model.safetensors) in this artifact.")
    history: str = Field(description="JSON file in this artifact: for each metric its [step, value] points.")
    tokenizer: str | None = Field(
        description="Folder with the tokenizer that the model was trained with: a path in the storage, or a URL; null: "
        "it was trained on ids that are no text."
    )
    seq_len: int
    vocab_size: int = Field(description="The model's, padded; there may be fewer token ids.")

    def figures(self) -> dict[str, float]:
        """At the end of training; speed and MFU are those of the whole training."""
        figures = {
            "train/loss": self.final_train_loss,
            "valid/loss": self.final_valid_loss,
            "valid/loss_ema": self.averaged_valid_loss,
            "train/parameters": self.num_params,
            "train/tokens": self.tokens_seen,
            "train/time_s": self.train_time_s,
            "train/tokens_per_s": self.tokens_per_s,
            "train/mfu": self.mfu,
        }
        return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class TrainInputs(StageInputs):
    """Inputs of a `train` stage. `initial`: the stage whose weights it starts from.

    Several `tokens` are mixed, by config.data.weights. All have one tokenizer and one seq_len.
    """

    tokens: tuple[StageNode[TokenizeStage], ...]
    initial: StageNode[TrainStage] | None = None


class TrainStage(Stage[TrainStageConfig, TrainInputs, TrainOutput]):
    """Training as a stage: all its state is in the artifact's checkpoints/."""

    code_version = 7
    progress = ProgressMetrics(
        "train/max_steps",
        {
            "train/loss": "loss {:.3f}",
            "valid/loss": "valid {:.3f}",
            "train/tokens_per_s": "{:,.0f} tokens/s",
        },
    )
    uses_ray_train = True
    stops_in_order = True

    def mark(self, config: TrainStageConfig, artifact: ArtifactDir) -> int:
        """The step of the newest checkpoint."""
        return max(complete_steps(artifact), default=0)

    def check(self, name: str, config: TrainStageConfig, inputs: TrainInputs) -> None:
        """Refuse a model that cannot read such sequences, or has no room for the token ids."""
        tokens = inputs.tokens[0]
        for other in inputs.tokens[1:]:
            check_same_form(name, tokens, other)
        check_mixture(config, name, [node.name for node in inputs.tokens])
        check_seq_len(config, tokens.config.seq_len, name, tokens.name)
        _check_groups(name, config)
        _check_oracle(name, config, inputs)
        check_start(name, config, inputs)
        tokenizer, room = tokens.inputs.tokenizer, config.model.vocab_size
        if tokenizer is not None and tokenizer.config.load is not None:
            return  # how many ids it has is known when it is read
        vocab_size = planned_vocab_size(tokens)
        if room is not None and room < vocab_size:
            whose = (
                f"the tokenizer {tokenizer.name!r} ({tokenizer.name}.vocab_size)"
                if tokenizer is not None
                else f"the source of {tokens.name!r}"
            )
            raise FieldError(
                ("stages", name, "model", "vocab_size"),
                f"found {room}, which is less than the {vocab_size} ids of {whose}. Leave it out, or set it to "
                f"{vocab_size} or more.",
            )

    def section(self, node: StageNode[Self]) -> Section:
        """Its facts and curves."""
        return training_section(node, read_history(node.artifact))

    def estimate(self, stages: Sequence[StageNode[Self]], machines: Machines) -> Sequence[Estimate]:
        """Parameters, tokens, FLOPs, memory, disk, time and cost, and what would fit."""
        from pipelines.stages.train.planning.estimate import estimate_all

        return estimate_all(stages, machines)

    def check_memory(self, node: StageNode[Self], machines: Machines) -> None:
        """Refuse a step that needs more memory than a worker can have."""
        from pipelines.stages.train.planning.fitting import check_fits

        check_fits(node, machines)

    def run(self, config: TrainStageConfig, inputs: TrainInputs, context: StageContext) -> TrainOutput:
        """Train to the end, from the newest checkpoint if there is one.

        Raises: UserError: settings that do not fit the data, training that diverges, workers without room.
        """
        from pipelines.stages.train.launch import run_training
        from pipelines.tracking.remote import log_missing, remote_journal

        tokens = inputs.tokens[0]
        for node in inputs.tokens:
            context.journal.log_dataset(node.name, node.output.train_sha256, node.artifact.url, context="train")
        try:
            with remote_journal(context.journal, context.stop) as metrics:
                job = make_job(config, inputs, context, metrics)
                facts = run_training(job, context.attempt, context.journal)
        finally:  # of a training that failed too: they say why
            for path in (INCIDENTS, PROFILE, RESUMES):
                if context.artifact.exists(path):
                    context.journal.log_artifact(path)
        log_missing(workers_journal(context.journal.path), facts.history)
        _warn_if_worse(facts, config)
        context.artifact.write_json(HISTORY, facts.history)
        for path in (HISTORY, "model/config.json"):
            context.journal.log_artifact(path)
        assert job.model.vocab_size is not None
        return TrainOutput(
            **facts.model_dump(exclude={"history"}),
            model="model",
            history=HISTORY,
            tokenizer=context.artifact.reference_to(tokens.artifact, TOKENIZER_FOLDER)
            if tokens.output.tokenizer_sha256 is not None
            else None,
            seq_len=tokens.output.seq_len,
            vocab_size=job.model.vocab_size,
        )


def read_history(artifact: ArtifactDir) -> History:
    """Every point of the curves of a finished train stage."""
    artifact.fetch(HISTORY)
    return {
        metric: [(int(step), float(value)) for step, value in points]
        for metric, points in artifact.read_json(HISTORY).items()
    }


def _warn_if_worse(facts: TrainFigures, config: TrainStageConfig) -> None:
    before, after = facts.initial_valid_loss, facts.final_valid_loss
    if before is not None and after is not None and after > _FAR_WORSE * before:
        logger.warning(
            "training made the model worse: validation loss %.4g before the first step, %.4g after the last. Try a "
            "lower lr (now %g) or more warmup_steps (now %d).",
            before, after, config.lr, config.warmup_steps,
        )  # fmt: skip


def make_job(config: TrainStageConfig, inputs: TrainInputs, context: StageContext, metrics: MetricSink) -> TrainJob:
    """Make what the workers are given. Raises UserError: the settings do not fit the data."""
    tokens = inputs.tokens[0]
    sources = tuple(
        TokenSource(
            node.name, node.artifact, node.output.num_train_samples, has_validation=node.output.num_valid_samples > 0
        )
        for node in inputs.tokens
    )
    num_steps = config.num_steps(tokens.output.seq_len)
    start = start_of(context.name, config, inputs.initial)
    return TrainJob(
        config=config,
        model=_sized_model(config, tokens),
        num_steps=num_steps,
        seq_len=tokens.output.seq_len,
        artifact=context.artifact,
        sources=sources,
        mixture=mixture_of(config, sources, num_steps, start.first_position if start else 0),
        start=start,
        resume_step=None,
        metrics=metrics,
    )


def _check_groups(name: str, config: TrainStageConfig) -> None:
    """Refuse a group of parameters that the model does not have. Raises FieldError."""
    if config.groups:
        from pipelines.stages.train.optimizers.groups import idle_group, names_of

        problem = idle_group(config.groups, names_of(config.model))
        if problem is not None:
            raise FieldError(("stages", name, "groups"), problem)


def _check_oracle(name: str, config: TrainStageConfig, inputs: TrainInputs) -> None:
    """Refuse an oracle where the tokens do not say what is wanted. Raises FieldError."""
    if config.model.selection != "oracle" or "bmojo" not in config.model.mixers:
        return
    for node in inputs.tokens:
        source = node.config.source
        if not isinstance(source, SyntheticSource):
            raise FieldError(
                ("stages", name, "model", "selection"),
                f"found oracle, which keeps the positions that answers are read off, but {node.name} reads a source "
                f"of kind {source.kind}, in which nothing marks such. Use a synthetic source, or another selection.",
            )
        if not source.mark_sources:
            raise FieldError(
                ("stages", node.name, "source", "mark_sources"),
                f"is false, and {name} trains with model.selection=oracle, which keeps the marked positions. Set it "
                "to true.",
            )


def check_same_form(name: str, first: StageNode[TokenizeStage], other: StageNode[TokenizeStage]) -> None:
    """Refuse tokens that the stage `name` cannot use together. Raises FieldError."""
    if other.config.seq_len != first.config.seq_len:
        raise FieldError(
            ("stages", other.name, "seq_len"),
            f"found {other.config.seq_len}, but {first.name}.seq_len is {first.config.seq_len}, and {name} uses "
            "both. Give both one length.",
        )
    found, expected = _ids_in_words(other), _ids_in_words(first)
    if found != expected:
        raise FieldError(
            ("stages", other.name, "needs" if other.inputs.tokenizer else "source"),
            f"found {found}, but {first.name} has {expected}, and {name} uses both. Give both one tokenizer, "
            "or the same ids.",
        )


def _ids_in_words(tokens: StageNode[TokenizeStage]) -> str:
    """What the token ids are: equal for stages that can be mixed."""
    own, tokenizer = tokens.config.source.vocabulary, tokens.inputs.tokenizer
    if own is None:
        assert tokenizer is not None, "check() refuses text without a tokenizer"
        return f"the tokenizer {tokenizer.name!r}"
    answers = ", and the loss on answers only" if own.has_loss_mask else ""
    return f"{own.size} ids of its own, {own.eod_id} ending documents{answers}"


def padded_vocab_size(num_ids: int) -> int:
    """Rows of the embedding for a tokenizer of `num_ids` ids."""
    return -(-num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _sized_model(config: TrainStageConfig, tokens: StageNode[TokenizeStage]) -> ModelConfig:
    """The model's config with room for every token id."""
    needed = tokens.output.vocab_size
    if config.model.vocab_size is None:
        return config.model.with_vocab_size(padded_vocab_size(needed))
    if config.model.vocab_size < needed:
        raise UserError(
            f"train.model.vocab_size={config.model.vocab_size} is less than the {needed} token ids of stage "
            f"{tokens.name!r}. Leave vocab_size out, or set it to {needed} or more."
        )
    return config.model

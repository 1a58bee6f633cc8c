"""The `evaluate` stage: how well a trained model predicts the validation split, near and far, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from pipelines.engine.stage import (
    ProgressMetrics,
    Resources,
    Stage,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.errors import FieldError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.numbers import optional, perplexity
from pipelines.stages.tasks import run_tasks
from pipelines.stages.tokenize.stage import TokenizeOutput, TokenizeStage
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER
from pipelines.stages.train.stage import TrainStage
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    import numpy as np

    from pipelines.stages.evaluate.scoring import Score
    from pipelines.stages.evaluate.work import Subject

BATCHES_PER_TASK = 4


class SampleText(StageOutput):
    """A prompt and what the model made of it."""

    prompt: str
    text: str


class EvaluateOutput(StageOutput):
    """The figures of one model. Losses are nats per token, positions and lengths tokens."""

    seq_len: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    untrained_bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    context_tokens: int = Field(
        description="Length up to which loss by position was measured; 0: no document is long enough."
    )
    num_windows: int
    position_bin_ends: tuple[int, ...]
    position_loss: tuple[float, ...]
    samples: tuple[SampleText, ...]

    def figures(self) -> dict[str, float]:
        """Those of the whole validation split, and the baselines'."""
        figures = {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/untrained_bits_per_byte": self.untrained_bits_per_byte,
            "eval/gzip_bits_per_byte": self.gzip_bits_per_byte,
        }
        return {name: value for name, value in figures.items() if value is not None}

    def report_cells(self) -> dict[str, str]:
        """Those of the whole validation split, and the baselines'."""
        return {
            "loss (nats/token)": f"{self.loss:.4f}",
            "perplexity": f"{self.perplexity:.2f}",
            "bits per byte": f"{self.bits_per_byte:.3f}",
            "untrained": optional(self.untrained_bits_per_byte, "{:.3f}"),
            "gzip -9": optional(self.gzip_bits_per_byte, "{:.3f}"),
        }

    @property
    def position_perplexity(self) -> list[tuple[int, float]]:
        """Perplexity in each bin of positions, by the end of the bin."""
        bins = zip(self.position_bin_ends, self.position_loss, strict=True)
        return [(end, perplexity(loss)) for end, loss in bins]


@dataclass(frozen=True)
class EvaluateInputs(StageInputs):
    """Inputs of an `evaluate` stage: a model, and the validation split to evaluate it on."""

    trained: StageNode[TrainStage]
    tokens: StageNode[TokenizeStage]


class EvaluateStage(Stage[EvaluateStageConfig, EvaluateInputs, EvaluateOutput]):
    """Spread over Ray tasks; nothing is kept between attempts, since it takes seconds to minutes."""

    code_version = 1
    progress = ProgressMetrics("evaluate/tasks_total", {})

    def check(self, name: str, config: EvaluateStageConfig, inputs: EvaluateInputs) -> None:
        """Refuse a tokenize stage without a validation split."""
        if not inputs.tokens.config.validation_fraction:
            raise FieldError(
                ("stages", inputs.tokens.name, "validation_fraction"),
                f"is 0, so {name!r} has nothing to evaluate on. Set it above 0 (0.01 keeps a hundredth of the "
                "documents).",
            )

    def run(self, config: EvaluateStageConfig, inputs: EvaluateInputs, context: StageContext) -> EvaluateOutput:
        """Evaluate the trained model on the validation split."""
        from pipelines.stages.evaluate import work

        trained, tokens = inputs.trained, inputs.tokens
        assert tokens.output.valid_sha256 is not None, "check() refuses a tokenize stage without a validation split"
        context.journal.log_dataset(tokens.name, tokens.output.valid_sha256, tokens.artifact.url, context="eval")
        subject = work.Subject(
            trained.artifact, trained.output.model, tokens.artifact, TOKENIZER_FOLDER, config.resources
        )
        windows, bin_ends = _windows(config, subject, tokens.output)
        results = _run(_tasks(config, subject, tokens.output, windows, bin_ends), config.resources, context)
        output = _output(config, tokens.output, results, bin_ends)
        context.artifact.write_json("results.json", output.model_dump(mode="json"))
        context.journal.log_metrics(0, output.figures())
        context.journal.log_artifact("results.json")
        return output

    def headline(self, config: EvaluateStageConfig, output: EvaluateOutput, artifact: ArtifactDir) -> str:
        """The loss in its three units, beside the baselines."""
        baselines = {"gzip -9": output.gzip_bits_per_byte, "untrained": output.untrained_bits_per_byte}
        compared = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items() if value is not None)
        return (
            f"[bold]{output.bits_per_byte:.3f} bits per byte[/]{f' ({compared})' if compared else ''}, "
            f"loss {output.loss:.4f} nats per token, perplexity {output.perplexity:.2f}, "
            f"on {output.num_documents} documents"
        )


@dataclass(frozen=True)
class _Results:
    """Results of an evaluation's tasks, by what they did, in the order of the tasks."""

    trained: list[Score] = field(default_factory=list)
    untrained: list[Score] = field(default_factory=list)
    gzip: list[float] = field(default_factory=list)
    window: list[np.ndarray] = field(default_factory=list)
    sample: list[str] = field(default_factory=list)


class _Task(NamedTuple):
    """`result`: the list of _Results that its result goes to."""

    result: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def _tasks(
    config: EvaluateStageConfig,
    subject: Subject,
    tokens: TokenizeOutput,
    windows: list[np.ndarray],
    bin_ends: list[int],
) -> list[_Task]:
    from pipelines.stages.evaluate import work

    subjects = {"trained": subject}
    tasks = []
    if config.baselines:
        subjects["untrained"] = replace(subject, untrained=True)
        tasks.append(_Task("gzip", work.gzip_bits_per_byte, (subject,)))
    for prompt in config.sample.prompts:
        tasks.append(_Task("sample", work.sample_text, (subject, prompt, config.sample)))
    for window in windows:
        tasks.append(_Task("window", work.score_window, (subject, window, tuple(bin_ends))))
    num_batches = _num_batches(config, tokens)
    for name, scored in subjects.items():
        for start in range(0, num_batches, BATCHES_PER_TASK):
            stop = min(start + BATCHES_PER_TASK, num_batches)
            tasks.append(_Task(name, work.score_batches, (scored, config.batch_size, start, stop)))
    return tasks


def _run(tasks: list[_Task], resources: Resources, context: StageContext) -> _Results:
    done: dict[int, Any] = {}
    context.journal.log_metrics(0, {"evaluate/tasks_total": len(tasks)})
    calls = [(index, task.function, task.arguments) for index, task in enumerate(tasks)]
    for index, result in run_tasks(_numbered, calls, resources):
        done[index] = result
        context.journal.log_metrics(len(done), {"evaluate/tasks_done": len(done)})
    results = _Results()
    for index, task in enumerate(tasks):
        getattr(results, task.result).append(done[index])
    return results


def _numbered(index: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """Runs as a Ray task."""
    return index, function(*arguments)


def _num_batches(config: EvaluateStageConfig, tokens: TokenizeOutput) -> int:
    """Batches of the validation split that are scored."""
    num_samples = tokens.num_valid_samples
    if config.max_tokens is not None:
        num_samples = min(num_samples, -(-config.max_tokens // tokens.seq_len))
    return -(-num_samples // config.batch_size)


def _windows(
    config: EvaluateStageConfig, subject: Subject, tokens: TokenizeOutput
) -> tuple[list[np.ndarray], list[int]]:
    """Stretches of `context_multiple` training lengths, or as long as documents allow, and the bins of positions."""
    import numpy as np

    from data.shards import read_token_documents
    from pipelines.stages.evaluate import scoring
    from pipelines.stages.evaluate.work import SPLIT

    # As in training, a document begins with the end-of-document token.
    documents = [np.concatenate(([tokens.eod_id], ids)) for ids in read_token_documents(subject.shards(), SPLIT)]
    for multiple in range(config.context_multiple, 0, -1):
        context_tokens = multiple * tokens.seq_len
        windows = scoring.long_windows(documents, context_tokens, config.context_windows)
        if windows:
            return windows, scoring.position_bins(tokens.seq_len, context_tokens)
    return [], []


def _output(
    config: EvaluateStageConfig, tokens: TokenizeOutput, results: _Results, bin_ends: list[int]
) -> EvaluateOutput:
    import numpy as np

    score = _total(results.trained)
    num_windows = len(results.window)
    if num_windows:
        losses = sum(results.window) / np.diff([0, *bin_ends]) / num_windows
    else:
        losses = np.zeros(0)
    return EvaluateOutput(
        seq_len=tokens.seq_len,
        num_documents=tokens.num_valid_documents,
        num_tokens=score.num_tokens,
        num_bytes=score.num_bytes,
        loss=score.loss,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        untrained_bits_per_byte=_total(results.untrained).bits_per_byte if config.baselines else None,
        gzip_bits_per_byte=results.gzip[0] if config.baselines else None,
        context_tokens=bin_ends[-1] if bin_ends else 0,
        num_windows=num_windows,
        position_bin_ends=tuple(bin_ends),
        position_loss=tuple(losses.tolist()),
        samples=tuple(
            SampleText(prompt=prompt, text=text)
            for prompt, text in zip(config.sample.prompts, results.sample, strict=True)
        ),
    )


def _total(scores: list[Score]) -> Score:
    first, *others = scores
    return sum(others, start=first)

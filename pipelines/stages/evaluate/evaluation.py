"""The course of an evaluation: its tasks, their results, the figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from data.config import SyntheticSource
from data.shards import read_token_documents
from pipelines.engine.stage import Resources, StageNode
from pipelines.stages.evaluate import scoring, work
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.stage import EvaluateOutput, SampleText
from pipelines.stages.tasks import run_tasks
from pipelines.stages.tokenize.stage import TokenizeOutput, TokenizeStage
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER
from pipelines.stages.train.stage import TrainStage
from pipelines.tracking.journal import Journal

BATCHES_PER_TASK = 4


def evaluate(
    config: EvaluateStageConfig, trained: StageNode[TrainStage], tokens: StageNode[TokenizeStage], journal: Journal
) -> EvaluateOutput:
    """Score the trained model on the validation split in Ray tasks. Raises as run_tasks."""
    subject = work.Subject(
        trained.artifact,
        trained.output.model,
        tokens.artifact,
        TOKENIZER_FOLDER if tokens.output.is_text else None,
        tokens.output.has_loss_mask,
        config.resources,
    )
    windows, bin_ends = _windows(config, subject, tokens.output)
    results = _run(_tasks(config, subject, tokens.output, windows, bin_ends), config.resources, journal)
    source = tokens.config.source
    chance = source.task.chance if isinstance(source, SyntheticSource) else None
    return _output(config, tokens.output, results, bin_ends, chance)


@dataclass(frozen=True)
class _Results:
    """Results of an evaluation's tasks, by what they did, in the order of the tasks."""

    trained: list[scoring.Score] = field(default_factory=list)
    untrained: list[scoring.Score] = field(default_factory=list)
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
    subject: work.Subject,
    tokens: TokenizeOutput,
    windows: list[np.ndarray],
    bin_ends: list[int],
) -> list[_Task]:
    subjects = {"trained": subject}
    tasks = []
    if config.baselines and tokens.is_text:
        subjects["untrained"] = replace(subject, untrained=True)
        tasks.append(_Task("gzip", work.gzip_bits_per_byte, (subject,)))
    for prompt in config.sample.prompts if tokens.is_text else ():
        tasks.append(_Task("sample", work.sample_text, (subject, prompt, config.sample)))
    for window in windows:
        tasks.append(_Task("window", work.score_window, (subject, window, tuple(bin_ends))))
    num_batches = _num_batches(config, tokens)
    for name, scored in subjects.items():
        for start in range(0, num_batches, BATCHES_PER_TASK):
            stop = min(start + BATCHES_PER_TASK, num_batches)
            tasks.append(_Task(name, work.score_batches, (scored, config.batch_size, start, stop)))
    return tasks


def _run(tasks: list[_Task], resources: Resources, journal: Journal) -> _Results:
    done: dict[int, Any] = {}
    journal.log_metrics(0, {"evaluate/tasks_total": len(tasks)})
    calls = [(index, task.function, task.arguments) for index, task in enumerate(tasks)]
    for index, result in run_tasks(_numbered, calls, resources):
        done[index] = result
        journal.log_metrics(len(done), {"evaluate/tasks_done": len(done)})
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
    config: EvaluateStageConfig, subject: work.Subject, tokens: TokenizeOutput
) -> tuple[list[np.ndarray], list[int]]:
    """Stretches of `context_multiple` training lengths, or as long as documents allow, and the bins of positions.

    None of a task, in which only answers count.
    """
    if tokens.has_loss_mask:
        return [], []
    # As in training, a document begins with the end-of-document token.
    documents = [np.concatenate(([tokens.eod_id], ids)) for ids in read_token_documents(subject.split())]
    for multiple in range(config.context_multiple, 0, -1):
        context_tokens = multiple * tokens.seq_len
        windows = scoring.long_windows(documents, context_tokens, config.context_windows)
        if windows:
            return windows, scoring.position_bins(tokens.seq_len, context_tokens)
    return [], []


def _output(
    config: EvaluateStageConfig,
    tokens: TokenizeOutput,
    results: _Results,
    bin_ends: list[int],
    chance: float | None,
) -> EvaluateOutput:
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
        num_bytes=score.num_bytes if tokens.is_text else None,
        loss=score.loss,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte if tokens.is_text else None,
        untrained_bits_per_byte=_total(results.untrained).bits_per_byte if results.untrained else None,
        gzip_bits_per_byte=results.gzip[0] if results.gzip else None,
        accuracy=score.num_right / score.num_tokens if tokens.has_loss_mask else None,
        chance_accuracy=chance,
        context_tokens=bin_ends[-1] if bin_ends else 0,
        num_windows=num_windows,
        position_bin_ends=tuple(bin_ends),
        position_loss=tuple(losses.tolist()),
        samples=tuple(
            SampleText(prompt=prompt, text=text)
            for prompt, text in zip(config.sample.prompts if tokens.is_text else (), results.sample, strict=True)
        ),
    )


def _total(scores: list[scoring.Score]) -> scoring.Score:
    first, *others = scores
    return sum(others, start=first)

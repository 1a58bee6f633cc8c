"""The course of an evaluation: its tasks, their results, the figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from data.config import SyntheticSource
from data.shards import read_token_documents
from pipelines.engine.stage import StageNode
from pipelines.stages.actors import Call, call_actors
from pipelines.stages.evaluate import scoring, work
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.sampling import Drawing
from pipelines.stages.evaluate.stage import EvaluateOutput, SampleText
from pipelines.stages.tokenize.stage import TokenizeOutput, TokenizeStage
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER
from pipelines.stages.train.stage import TrainStage
from pipelines.tracking.journal import Journal


def evaluate(
    config: EvaluateStageConfig, trained: StageNode[TrainStage], tokens: StageNode[TokenizeStage], journal: Journal
) -> EvaluateOutput:
    """Score the trained model on the validation split in Ray actors. Raises as call_actors."""
    subject = work.Subject(
        trained.artifact,
        trained.output.model,
        tokens.artifact,
        TOKENIZER_FOLDER if tokens.output.is_text else None,
        tokens.output.has_loss_mask,
        config.resources.cpus_per_worker,
        config.on_gpu,
        config.used_precision == "bf16",
    )
    windows, bin_ends = _windows(config, subject, tokens.output)
    results = _run(subject, _tasks(config, tokens.output, windows, bin_ends), journal)
    source = tokens.config.source
    chance = source.task.chance if isinstance(source, SyntheticSource) else None
    return _output(config, tokens.output, results, bin_ends, chance)


@dataclass(frozen=True)
class _Results:
    """Results of an evaluation's tasks, by what they did, in the order of the tasks."""

    trained: list[scoring.Score] = field(default_factory=list)
    untrained: list[scoring.Score] = field(default_factory=list)
    gzip: list[float] = field(default_factory=list)
    windows: list[np.ndarray] = field(default_factory=list)
    samples: list[list[str]] = field(default_factory=list)


class _Task(NamedTuple):
    """`result`: the list of _Results that its result goes to."""

    result: str
    call: Call


def _tasks(
    config: EvaluateStageConfig, tokens: TokenizeOutput, windows: list[np.ndarray], bin_ends: list[int]
) -> list[_Task]:
    resources, sample = config.resources, config.sample
    pieces = config.pieces(tokens.seq_len, window_tokens=bin_ends[-1] if bin_ends else 1)
    models = ["trained"]
    tasks = []
    if config.baselines and tokens.is_text:
        models.append("untrained")
        tasks.append(_Task("gzip", Call("gzip_bits_per_byte", (), resources.without_accelerators())))
    drawing = Drawing(**sample.model_dump(exclude={"prompts"}))
    for first in range(0, len(sample.prompts) if tokens.is_text else 0, pieces.prompts):
        prompts = sample.prompts[first : first + pieces.prompts]
        tasks.append(_Task("samples", Call("continue_texts", (prompts, drawing), resources)))
    for first in range(0, len(windows), pieces.windows):
        windows_nt = np.stack(windows[first : first + pieces.windows])
        tasks.append(_Task("windows", Call("score_windows", (windows_nt, tuple(bin_ends)), resources)))
    num_batches = _num_batches(config, tokens, pieces.batch_size)
    for model in models:
        for start in range(0, num_batches, pieces.batches_per_task):
            stop = min(start + pieces.batches_per_task, num_batches)
            piece = (model == "untrained", pieces.batch_size, start, stop)
            tasks.append(_Task(model, Call("score_batches", piece, resources)))
    return tasks


def _run(subject: work.Subject, tasks: list[_Task], journal: Journal) -> _Results:
    done: dict[int, Any] = {}
    journal.log_metrics(0, {"evaluate/tasks_total": len(tasks)})
    for index, result in call_actors(work.Evaluator, (subject,), [task.call for task in tasks]):
        done[index] = result
        journal.log_metrics(len(done), {"evaluate/tasks_done": len(done)})
    results = _Results()
    for index, task in enumerate(tasks):
        getattr(results, task.result).append(done[index])
    return results


def _num_batches(config: EvaluateStageConfig, tokens: TokenizeOutput, batch_size: int) -> int:
    """Batches of the validation split that are scored."""
    num_samples = tokens.num_valid_samples
    if config.max_tokens is not None:
        num_samples = min(num_samples, -(-config.max_tokens // tokens.seq_len))
    return -(-num_samples // batch_size)


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
    sums = [sums for piece in results.windows for sums in piece]
    num_windows = len(sums)
    if num_windows:
        losses = sum(sums) / np.diff([0, *bin_ends]) / num_windows
    else:
        losses = np.zeros(0)
    prompts = config.sample.prompts if tokens.is_text else ()
    return EvaluateOutput(
        precision=config.used_precision,
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
            SampleText(prompt=prompt, text=text) for prompt, text in zip(prompts, chain(*results.samples), strict=True)
        ),
    )


def _total(scores: list[scoring.Score]) -> scoring.Score:
    first, *others = scores
    return sum(others, start=first)

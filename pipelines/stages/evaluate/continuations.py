"""How likely continuations of contexts are, and what a model writes itself: batched by length.

Zero-shot tasks and recall suites ask nothing else of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.stages.evaluate.language_model import LanguageModel
from pipelines.stages.train.device import copy_to

MAX_LOGITS = 1 << 26  # float32 logits of one batch, at most: 256 MiB
NO_TARGET = -100


class Continuation(NamedTuple):
    """Ids of a text and of what may follow it; both hold at least one."""

    context: Sequence[int]
    ids: Sequence[int]


class ContinuationScore(NamedTuple):
    """What a model thinks of a continuation.

    Attributes:
        logprob: sum of its tokens' log-probabilities, in nats.
        is_greedy: whether each of its tokens is the likeliest one there, so that greedy decoding writes it.
    """

    logprob: float
    is_greedy: bool


class _Row(NamedTuple):
    """A sequence without its last token. `number`: of the continuation; `targets`: what its last positions predict."""

    number: int
    ids: Sequence[int]
    targets: Sequence[int]


@torch.inference_mode()
def score_continuations(
    model: LanguageModel, continuations: Sequence[Continuation], batch_tokens: int, max_tokens: int | None = None
) -> list[ContinuationScore]:
    """Score continuations, in the order in which they are given. On a GPU the host waits once.

    Args:
        batch_tokens: at most about so many tokens go through the model at once, padding included.
        max_tokens: sequences are cut to their last `max_tokens` + 1 ids, the last of which is only predicted.
    Raises: ValueError: an empty context or continuation, or one that is longer than max_tokens.
    """
    rows = [_row(number, continuation, max_tokens) for number, continuation in enumerate(continuations)]
    rows.sort(key=lambda row: (-len(row.ids), row.number))
    if not rows:
        return []
    numbers: list[int] = []  # of the continuation that each target is of
    found: list[Tensor] = []  # per batch: log-probability of each target, and whether it is not the likeliest
    for batch in _batches(rows, batch_tokens, max(1, MAX_LOGITS // model.vocab_size)):
        numbers += [row.number for row in batch for _ in row.targets]
        found.append(_score(model, batch))
    logprob_s, missed_s = torch.cat(found, 1).cpu().numpy()  # added up here, in one order
    logprobs = np.bincount(numbers, weights=logprob_s, minlength=len(rows)).tolist()
    missed = np.bincount(numbers, weights=missed_s, minlength=len(rows)).tolist()
    return [ContinuationScore(logprob, not misses) for logprob, misses in zip(logprobs, missed, strict=True)]


def _row(number: int, continuation: Continuation, max_tokens: int | None) -> _Row:
    context, ids = list(continuation.context), list(continuation.ids)
    if not context or not ids or (max_tokens is not None and len(ids) > max_tokens):
        raise ValueError(
            f"continuation {number} has {len(ids)} tokens behind a context of {len(context)}; expected at least one "
            f"in each{'' if max_tokens is None else f', and at most {max_tokens} in the continuation'}."
        )
    whole = context + ids if max_tokens is None else (context + ids)[-(max_tokens + 1) :]
    return _Row(number, whole[:-1], ids)


def _batches(rows: Sequence[_Row], batch_tokens: int, max_scored: int) -> Iterator[list[_Row]]:
    """Rows of similar length together. `rows`: the longest first."""
    batch: list[_Row] = []
    num_scored = 0
    for row in rows:
        width = len(batch[0].ids) if batch else len(row.ids)
        if batch and ((len(batch) + 1) * width > batch_tokens or num_scored + len(row.targets) > max_scored):
            yield batch
            batch, num_scored = [], 0
        batch.append(row)
        num_scored += len(row.targets)
    if batch:
        yield batch


def _score(model: LanguageModel, batch: Sequence[_Row]) -> Tensor:
    """[2, targets], float64, on the model's device."""
    tokens_bt = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(batch):
        tokens_bt[index, : len(row.ids)] = torch.tensor(row.ids)
        rows += [index] * len(row.targets)
        columns += range(len(row.ids) - len(row.targets), len(row.ids))
        targets += row.targets
    tokens, rows_s, columns_s, targets_s = (
        copy_to(model.device, part)
        for part in (tokens_bt, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets))
    )
    logits_sv = model.logits_at(tokens, rows_s, columns_s).float()
    logprob_s = logits_sv.log_softmax(-1).gather(1, targets_s[:, None])[:, 0].double()
    return torch.stack((logprob_s, (logits_sv.argmax(-1) != targets_s).double()))


@torch.inference_mode()
def score_texts(
    model: LanguageModel, texts: Sequence[Continuation], batch_tokens: int, max_tokens: int | None = None
) -> list[float]:
    """Log-probability of each whole text, in nats: as score_continuations, for texts as long as documents.

    A text longer than `max_tokens` is read in windows: each scores what the one before has not, behind as many tokens
    as fit. So does lm-eval in its rolling log-likelihood.
    """
    windows = [window for number, text in enumerate(texts) for window in _windows(number, text, max_tokens)]
    windows.sort(key=lambda row: (-len(row.ids), row.number))
    totals = [0.0] * len(texts)
    found: list[Tensor] = []
    numbers: list[int] = []
    for batch in _batches(windows, batch_tokens, batch_tokens + 1):
        tokens_bt = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.long)
        targets_bt = torch.full_like(tokens_bt, NO_TARGET)
        for index, row in enumerate(batch):
            end = len(row.ids)
            tokens_bt[index, :end] = torch.tensor(row.ids)
            targets_bt[index, end - len(row.targets) : end] = torch.tensor(row.targets)
        nll_bt = model.token_losses(copy_to(model.device, tokens_bt), copy_to(model.device, targets_bt))
        found.append(nll_bt.double().sum(1))
        numbers += [row.number for row in batch]
    for number, nll in zip(numbers, torch.cat(found).tolist() if found else [], strict=True):
        totals[number] -= nll
    return totals


def _windows(number: int, text: Continuation, max_tokens: int | None) -> Iterator[_Row]:
    whole = [*text.context[-1:], *text.ids]
    width = max_tokens or len(whole)
    for start in range(0, len(text.ids), width):
        end = min(start + width, len(text.ids))
        yield _Row(number, whole[max(0, end - width) : end], whole[start + 1 : end + 1])

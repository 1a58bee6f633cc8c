"""Documents of synthetic tasks, each drawn by itself where it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from base.digest import digest_of
from data.config import SyntheticSource
from data.records import IS_SOURCE
from data.sources.document import LeftOut, Part, TokenDocument
from data.tasks.task import NO_SOURCE

_ID_BYTES = 4  # for planning: slices of as many tokens as text of this size would give
_MEASURED = 16  # documents


def content_identity(source: SyntheticSource) -> str:
    """Digest of the settings, from which the documents follow."""
    added_later = None if source.mark_sources else {"mark_sources"}
    return digest_of([source.model_dump_json(exclude=added_later)])


def text_bytes(source: SyntheticSource) -> int:
    """Size of text that would have as many tokens, about."""
    return int(source.num_documents * _mean_bytes(source))


def paths(source: SyntheticSource) -> list[Path]:
    """None: there are no files."""
    return []


def plan_parts(source: SyntheticSource, slice_bytes: int) -> Iterator[Part]:
    """Runs of documents of about slice_bytes, by the mean length of the first ones."""
    mean_bytes = _mean_bytes(source)
    step = max(int(slice_bytes / mean_bytes), 1)
    for start in range(0, source.num_documents, step):
        end = min(start + step, source.num_documents)
        yield Part("", start, end, int((end - start) * mean_bytes), 0)


def read_part(source: SyntheticSource, part: Part) -> Iterator[TokenDocument | LeftOut]:
    """Draw the documents of one part."""
    for number in range(part.start, part.end):
        yield _draw(source, number)


def _mean_bytes(source: SyntheticSource) -> float:
    lengths = [len(_draw(source, number).ids) for number in range(min(_MEASURED, source.num_documents))]
    return _ID_BYTES * sum(lengths) / len(lengths)


def _draw(source: SyntheticSource, number: int) -> TokenDocument:
    sequence = source.task.draw(np.random.default_rng((source.seed, number)))
    loss_mask = sequence.is_answer.astype(np.uint8)
    if source.mark_sources:
        loss_mask[sequence.source[sequence.source != NO_SOURCE]] |= IS_SOURCE
    return TokenDocument(f"{source.task.kind}:{number}", sequence.tokens, loss_mask=loss_mask)

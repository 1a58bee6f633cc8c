"""How token ids of documents become samples of equal length.

Documents A, B, ... make one stream, each behind an end-of-document token (eod), one more at the very end:

    eod A1 A2 A3 eod B1 B2 eod

The stream is cut into samples of seq_len + 1 tokens, each overlapping the next by one: all tokens of a sample but the
last are inputs, all but the first are targets. Beside the tokens stand the offsets of its eods, where documents start.
So every token of every document is a target exactly once, and so is each document's end; eod also is what a document's
first token is predicted from. Why so: docs/design/0010-documents-in-packed-sequences.md. Documents of a task say which
of their tokens the loss counts; ends are not among them.

`stream` makes one stream of all documents. `best_fit` makes many short ones: of documents that fit into one sample
together, or of a document that does not fit and those that fill up its last sample.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from data.config import Packing

DOC_STARTS_DTYPE = np.dtype("<i4")  # stored as bytes: MDS has no empty arrays, and a sample may begin no document
_SAMPLES_AT_ONCE = 64
_WINDOW_SAMPLES = 256  # of best_fit: what it chooses from holds at least this many, and
_WINDOW_TOKENS = 1 << 22

Item = TypeVar("Item")


class Encoded(NamedTuple):
    """A document as token ids.

    id: name that finds it again.
    start, end: the bytes of its file that hold it, `end` exclusive; -1 where they are not known.
    num_bytes: UTF-8 bytes of its text.
    loss_mask: IS_ANSWER for each of its tokens that the loss counts, and its end not; None: all, and its end. Plus
        IS_SOURCE where an answer is read off, if the source says so.
    """

    id: str
    start: int
    end: int
    num_bytes: int
    ids: np.ndarray
    loss_mask: np.ndarray | None = None

    @property
    def num_targets(self) -> int:
        """Its tokens and its end."""
        return len(self.ids) + 1


class Sample(NamedTuple):
    """At most seq_len + 1 tokens, and the offsets of the eods among them; which of the tokens the loss counts."""

    tokens: np.ndarray
    doc_starts: np.ndarray
    loss_mask: np.ndarray | None  # None: all


class Placed(NamedTuple):
    """A document and where its first target is, if the samples' targets are counted on, padding included."""

    document: Encoded
    position: int


class Block(NamedTuple):
    """The next samples, and the documents that begin in or shortly after them; both in order."""

    samples: list[Sample]
    documents: list[Placed]


def pack_stream(documents: Iterator[Encoded], seq_len: int, eod: np.ndarray) -> Iterator[Block]:
    """One behind the other. Only the last sample may be shorter."""
    stream = _Stream(eod)
    placed: list[Placed] = []
    position = 0
    for document in documents:
        placed.append(Placed(document, position))
        position += document.num_targets
        stream.add(document)
        if stream.num_tokens > _SAMPLES_AT_ONCE * seq_len:
            yield Block(stream.cut(seq_len), placed)
            placed = []
    if position:
        yield Block(stream.end(seq_len), placed)


def pack_best_fit(documents: Iterator[Encoded], seq_len: int, eod: np.ndarray) -> Iterator[Block]:
    """Documents that fit into a sample stand in one. A longer one fills whole samples, then its rest is as a document.

    Chosen from windows of documents: the largest first, each into the fullest sample that has room for it.
    """
    position = 0
    least = max(_WINDOW_TOKENS, _WINDOW_SAMPLES * seq_len)
    for window in groups_of(documents, least, lambda document: document.num_targets):
        for group in _best_fit([document.num_targets for document in window], seq_len):
            stream = _Stream(eod)
            placed = []
            at = position
            for index in group:
                placed.append(Placed(window[index], at))
                at += window[index].num_targets
                stream.add(window[index])
            samples = stream.end(seq_len)
            position += len(samples) * seq_len
            yield Block(samples, placed)


PACKERS: dict[Packing, Callable[[Iterator[Encoded], int, np.ndarray], Iterator[Block]]] = {
    "stream": pack_stream,
    "best_fit": pack_best_fit,
}


class _Stream:
    """Tokens that are not yet in samples, from the first of the next sample on."""

    def __init__(self, eod: np.ndarray) -> None:
        self._eod = eod
        self._pieces: list[np.ndarray] = []
        self._masks: list[np.ndarray | None] = []  # one for each piece
        self._doc_starts: list[int] = []
        self.num_tokens = 0

    def add(self, document: Encoded) -> None:
        self._begin_document()
        self._pieces.append(document.ids.astype(self._eod.dtype, copy=False))
        self._masks.append(document.loss_mask)
        self.num_tokens += len(document.ids)

    def cut(self, seq_len: int) -> list[Sample]:
        """The samples that are complete."""
        return self._samples(seq_len, (self.num_tokens - 1) // seq_len)

    def end(self, seq_len: int) -> list[Sample]:
        """All that is left; the last sample may be shorter."""
        self._begin_document()
        return self._samples(seq_len, -(-(self.num_tokens - 1) // seq_len))

    def _begin_document(self) -> None:
        self._doc_starts.append(self.num_tokens)
        self._pieces.append(self._eod)
        self._masks.append(None)
        self.num_tokens += 1

    def _samples(self, seq_len: int, num_samples: int) -> list[Sample]:
        tokens = np.concatenate(self._pieces)
        doc_starts = np.array(self._doc_starts, np.int64)
        loss_mask = self._loss_mask()
        samples = []
        for start in range(0, num_samples * seq_len, seq_len):
            end = min(start + seq_len + 1, len(tokens))
            low, high = np.searchsorted(doc_starts, (start, end))
            offsets = (doc_starts[low:high] - start).astype(DOC_STARTS_DTYPE)
            samples.append(Sample(tokens[start:end], offsets, None if loss_mask is None else loss_mask[start:end]))
        first_left = num_samples * seq_len
        self._pieces = [tokens[first_left:]]
        self._masks = [None if loss_mask is None else loss_mask[first_left:]]
        self._doc_starts = (doc_starts[doc_starts >= first_left] - first_left).tolist()
        self.num_tokens = max(len(tokens) - first_left, 0)
        return samples

    def _loss_mask(self) -> np.ndarray | None:
        """Of all pieces, if documents have masks: then all have, and the rest is no target."""
        if all(mask is None for mask in self._masks):
            return None
        pieces = zip(self._pieces, self._masks, strict=True)
        return np.concatenate([np.zeros(len(piece), np.uint8) if mask is None else mask for piece, mask in pieces])


def groups_of(items: Iterable[Item], least: int, size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in turn, in groups whose sizes sum to `least` or more; the last group has what is left."""
    group: list[Item] = []
    held = 0
    for item in items:
        group.append(item)
        held += size_of(item)
        if held >= least:
            yield group
            group, held = [], 0
    if group:
        yield group


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Groups of indices of `sizes`. A size above `room` stands first in its group, and only its rest takes room.

    Groups are in the order of their first index, and so are the indices in them, but for what stands first.
    """
    rests = [size % room if size > room else size for size in sizes]
    of_left: dict[int, list[list[int]]] = defaultdict(list)  # groups by the room that is left in them
    lefts: list[int] = []  # the keys of of_left, sorted
    groups: list[list[int]] = []

    def put(group: list[int], left: int) -> None:
        if left:
            if not of_left[left]:
                insort(lefts, left)
            of_left[left].append(group)

    # Those that do not fit open groups first, as each must stand first in one.
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i] <= room, -rests[i], i)):
        at = bisect_left(lefts, rests[index])
        if sizes[index] > room or at == len(lefts):
            groups.append([index])
            put(groups[-1], room - rests[index] if rests[index] else 0)
        else:
            left = lefts[at]
            group = of_left[left].pop()
            if not of_left[left]:
                del lefts[at]
            group.append(index)
            put(group, left - rests[index])
    for group in groups:
        head = 1 if sizes[group[0]] > room else 0
        group[head:] = sorted(group[head:])
    return sorted(groups)

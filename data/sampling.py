"""A sample of a source's text for the tokenizer: whole documents from all over it, the same ones every time."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from data.config import TextSource
from data.sources import Document, Slice, plan_slices, read_slice

_SLICE_BYTES = 1 << 20
_PIECE_BYTES = 256 << 10  # one place of the corpus gives about this much
_FEWEST_PIECES = 64
_SEED = 0


def sample_texts(source: TextSource, sample_bytes: int) -> Iterator[str]:
    """About `sample_bytes` of a source's text in whole documents; all of it, in order, if the source has no more.

    Places are drawn evenly over the planned bytes, one in each of as many equal stretches. What a place gives is drawn
    from all documents of the slice around it, so a compressed file, whose slices are large, is sampled throughout. A
    document that is longer than its place's share is taken whole, and later places give less.
    """
    slices = plan_slices(source, _SLICE_BYTES)
    planned_bytes = sum(slice_.num_bytes for slice_ in slices)
    if planned_bytes <= sample_bytes:  # by plan, which knows the size of compressed text only roughly
        yield from (text for text, _ in _draw(slices, sample_bytes, random.Random(_SEED)))
        return
    rng = random.Random(_SEED)
    num_pieces = max(sample_bytes // _PIECE_BYTES, _FEWEST_PIECES)
    allowed_bytes = taken_bytes = 0.0
    for slice_, share in _shares(slices, planned_bytes, num_pieces, rng):
        allowed_bytes += share * sample_bytes
        if allowed_bytes <= taken_bytes:
            continue
        for text, num_bytes in _draw([slice_], allowed_bytes - taken_bytes, rng):
            taken_bytes += num_bytes
            yield text


def _shares(
    slices: list[Slice], planned_bytes: int, num_pieces: int, rng: random.Random
) -> Iterator[tuple[Slice, float]]:
    """Slices with a place in them, in order, each with its share of the sample; shares sum to 1."""
    places = ((piece + rng.random()) / num_pieces * planned_bytes for piece in range(num_pieces))
    ends, end = [], 0
    for slice_ in slices:
        end += slice_.num_bytes
        ends.append(end)
    found: Counter[int] = Counter()
    index = 0
    for place in places:
        while ends[index] <= place and index + 1 < len(ends):
            index += 1
        found[index] += 1
    for index, count in found.items():
        yield slices[index], count / num_pieces


def _draw(slices: Sequence[Slice], wanted_bytes: float, rng: random.Random) -> list[tuple[str, int]]:
    """Texts drawn from all of some slices until they hold about `wanted_bytes`, in their order, with their sizes.

    Memory is bounded by wanted_bytes and one document: of the documents so far those with the highest keys are held.
    """
    held: list[tuple[float, int, int, str]] = []  # key, index, bytes, text
    held_bytes = 0
    documents = (document for slice_ in slices for document in read_slice(slice_) if isinstance(document, Document))
    for index, document in enumerate(documents):
        num_bytes = len(document.text.encode())
        heapq.heappush(held, (rng.random(), index, num_bytes, document.text))
        held_bytes += num_bytes
        while len(held) > 1 and held_bytes - held[0][2] / 2 > wanted_bytes:  # without it nearer to what is wanted
            held_bytes -= heapq.heappop(held)[2]
    return [(text, num_bytes) for _, _, num_bytes, text in sorted(held, key=lambda entry: entry[1])]

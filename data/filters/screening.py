"""All filters of a source, applied to the documents of a slice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from data.filters import AnyFilter
from data.filters.duplicates import (
    DuplicateFilter,
    find_pairs,
    join_pairs,
    number_of,
    of_slice,
    place_of,
    write_fingerprints,
)
from data.filters.filter import Judge, Rejection
from data.records import Reason
from data.sources import AnyDocument, Document, Slice, read_slice

if TYPE_CHECKING:
    import numpy as np


class Verdict(NamedTuple):
    """What filters say of a document.

    Attributes:
        document: as it is handed on, perhaps changed; as it came to the filter that left it out.
        number: data.filters.duplicates.number_of.
        rejection: why it is left out; None: it is not.
        filter: place in the list of the filter that left it out; -1: none.
    """

    document: Document
    number: int
    rejection: Rejection | None
    filter: int = -1


class Screening(NamedTuple):
    """Filters, and what those that compare documents have found.

    Attributes:
        left_out: for each filter that compares documents: see data.filters.duplicates.join_pairs. Without an entry for
            each of them, only the filters before the first without one are applied.
    """

    filters: tuple[AnyFilter, ...]
    left_out: tuple[np.ndarray, ...] = ()

    def of_slice(self, slice_index: int) -> Screening:
        """The same with what concerns one slice only, which is small enough to travel."""
        if not self.left_out:
            return self
        import numpy as np

        low, high = number_of(slice_index, 0), number_of(slice_index + 1, 0)
        rows = [np.searchsorted(found[:, 0], (low, high)) for found in self.left_out]
        return self._replace(
            left_out=tuple(found[slice(*some)] for found, some in zip(self.left_out, rows, strict=True))
        )

    def next_comparison(self) -> DuplicateFilter | None:
        """The first filter that compares documents and has found nothing yet."""
        comparing = [filter_ for filter_ in self.filters if isinstance(filter_, DuplicateFilter)]
        return comparing[len(self.left_out)] if len(self.left_out) < len(comparing) else None

    def verdicts(self, documents: Iterable[AnyDocument], slice_index: int) -> Iterator[Verdict]:
        """What the filters say of each document of a slice, in order. Args: documents: as read_slice gives them."""
        steps = self._steps(slice_index)
        for ordinal, document in enumerate(documents):
            assert isinstance(document, Document), "only text is filtered"
            number = number_of(slice_index, ordinal)
            for place, step in enumerate(steps):
                if isinstance(step, Mapping):
                    judged = document.text if (first := step.get(ordinal)) is None else self._duplicate(place, first)
                else:
                    judged = step(document.text)
                if isinstance(judged, Rejection):
                    yield Verdict(document, number, judged, place)
                    break
                if judged is not document.text:
                    document = replace(document, text=judged)
                    if not judged:
                        yield Verdict(document, number, Rejection("empty", "nothing is left of it"), place)
                        break
            else:
                yield Verdict(document, number, None)

    def kept(
        self, documents: Iterable[AnyDocument], slice_index: int, left_out: Counter[Reason]
    ) -> Iterator[AnyDocument]:
        """The documents that no filter leaves out. Args: left_out: counts the others."""
        for verdict in self.verdicts(documents, slice_index) if self.filters else ():
            if verdict.rejection is None:
                yield verdict.document
            else:
                left_out[verdict.rejection.reason] += 1
        if not self.filters:
            yield from documents

    def _steps(self, slice_index: int) -> list[Judge | Mapping[int, int]]:
        steps: list[Judge | Mapping[int, int]] = []
        found = iter(self.left_out)
        for filter_ in self.filters:
            if not isinstance(filter_, DuplicateFilter):
                steps.append(filter_.judge())
            elif (left_out := next(found, None)) is not None:
                steps.append(of_slice(left_out, slice_index))
            else:
                break
        return steps

    def _duplicate(self, place: int, first: int) -> Rejection:
        filter_ = self.filters[place]
        assert isinstance(filter_, DuplicateFilter)
        slice_index, ordinal = place_of(first)
        return Rejection(filter_.reason, f"as document {ordinal} of slice {slice_index}")


NO_FILTERS = Screening(())


def write_slice_fingerprints(slice_: Slice, screening: Screening, folder: Path) -> int:
    """Note what the next filter that compares documents needs to know of a slice. Returns the number of documents."""
    comparing = screening.next_comparison()
    assert comparing is not None
    verdicts = screening.verdicts(read_slice(slice_), slice_.index)
    documents = ((verdict.number, verdict.document.text) for verdict in verdicts if verdict.rejection is None)
    return write_fingerprints(documents, comparing, folder)


def compare(slices: Sequence[Slice], filters: tuple[AnyFilter, ...]) -> Screening:
    """Let all filters that compare documents find what they leave out, in this process: of sources of modest size."""
    import numpy as np

    screening = Screening(filters)
    while (comparing := screening.next_comparison()) is not None:
        with TemporaryDirectory() as scratch:
            folders = [
                folder
                for slice_ in slices
                if write_slice_fingerprints(slice_, screening, folder := Path(scratch) / str(slice_.index))
            ]
            pairs = [find_pairs(folders, comparing, column) for column in range(comparing.num_columns) if folders]
        left_out = join_pairs(np.concatenate([np.empty((0, 2), np.int64), *pairs]))
        screening = screening._replace(left_out=(*screening.left_out, left_out))
    return screening


def screened(slices: Sequence[Slice], filters: tuple[AnyFilter, ...]) -> Iterator[Verdict]:
    """What filters say of each document of some slices, in order: to look at, and to test filters with."""
    screening = compare(slices, filters)
    for slice_ in slices:
        yield from screening.verdicts(read_slice(slice_), slice_.index)

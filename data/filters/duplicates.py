"""Documents that another one equals, or nearly equals: the first of those that belong together stays.

That takes passes over the source before the one that writes shards. Every slice notes fingerprints of its documents,
alone. Documents with a key in common are compared by what else was noted of them, one column of keys at a time, and
pairs are joined to groups. Who does which part of this when cannot matter, since documents have numbers: that of their
slice, and among all that its sources hand on. The one with the least number stays.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from base.config import StrictConfig
from data.errors import DataError
from data.filters.mixing import mixed
from data.records import Reason

if TYPE_CHECKING:
    import numpy as np

_TEXTS_AT_ONCE = 256
_SLICE_BITS = 32  # of a document's number; the bits below are its number in its slice
_WORD = re.compile(r"\w+")
FINGERPRINTS = ("numbers.npy", "keys.npy", "details.npy")


def number_of(slice_index: int, ordinal: int) -> int:
    """The number of a document. Args: ordinal: its place among all documents of the slice, from 0."""
    return slice_index << _SLICE_BITS | ordinal


def place_of(number: int) -> tuple[int, int]:
    """Slice and place in the slice of the document with this number."""
    return number >> _SLICE_BITS, number & (1 << _SLICE_BITS) - 1


class Fingerprints(NamedTuple):
    """What is noted of n documents.

    Attributes:
        keys: (columns, n) uint64; documents that belong together likely have one in common, in the same column.
        details: (n, ...) what tells whether they do.
    """

    keys: np.ndarray
    details: np.ndarray


class DuplicateFilter(StrictConfig, ABC):
    """The settings of a filter that compares documents with each other."""

    reason: ClassVar[Reason]

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """Number of keys of a document."""

    @abstractmethod
    def fingerprints(self, texts: Sequence[str]) -> Fingerprints:
        """Fingerprints of texts. Raises DataError: a package is not installed."""

    @abstractmethod
    def is_same(self, details: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(n,) bool: whether documents that have a key in common belong together, by their details."""


class ExactDuplicates(DuplicateFilter):
    """Leave out documents whose text is, to the character, that of an earlier one."""

    kind: Literal["exact_duplicates"]
    reason: ClassVar[Reason] = "duplicate"

    @property
    def num_columns(self) -> int:
        """One key."""
        return 1

    def fingerprints(self, texts: Sequence[str]) -> Fingerprints:
        """Two halves of a digest of 128 bits: key and detail."""
        import numpy as np

        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
        halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
        return Fingerprints(halves[:, :1].T.copy(), halves[:, 1:].copy())

    def is_same(self, details: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The same digest."""
        same: np.ndarray = (details == others).all(axis=1)
        return same


class NearDuplicates(DuplicateFilter):
    """Leave out documents that share most of their runs of words with an earlier one (MinHash; extra `clean`).

    Similarity is the share of the runs that both have in those that either has (Jaccard), as told by num_hashes least
    hashes. It is computed for documents that agree in all hashes of a band: of two with similarity s a share of
    1 - (1 - s^r)^b is found, where b is num_bands and r = num_hashes / num_bands.
    """

    kind: Literal["near_duplicates"]
    threshold: float = Field(0.5, gt=0, le=1, description="Least similarity of documents that belong together.")
    shingle_words: int = Field(
        5,
        ge=1,
        description="Words of a run. If one word in twenty differs, three runs of five in four are equal.",
    )
    num_hashes: int = Field(128, ge=2, le=4096, description="Hashes noted of a document, 4 bytes each.")
    num_bands: int = Field(32, ge=1, description="Groups of these hashes; a divisor of num_hashes.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the hashes.")
    reason: ClassVar[Reason] = "near_duplicate"

    @model_validator(mode="after")
    def _bands_divide_hashes(self) -> Self:
        if self.num_hashes % self.num_bands:
            raise ValueError(
                f"num_hashes={self.num_hashes} is not a multiple of num_bands={self.num_bands}; change one."
            )
        return self

    @property
    def num_columns(self) -> int:
        """A key for each band."""
        return self.num_bands

    def fingerprints(self, texts: Sequence[str]) -> Fingerprints:
        """Bands of the least hashes, and these."""
        import numpy as np

        try:
            from rensa import RMinHash
        except ImportError as error:
            raise DataError(
                "filters: kind near_duplicates needs the package rensa: pip install 'bmojo-pipeline[clean]'."
            ) from error
        shingles = [self._shingles(text) for text in texts]
        signatures = np.array(RMinHash.digests_from_token_sets(shingles, self.num_hashes, self.seed), np.uint32)
        bands = signatures.reshape(len(texts), self.num_bands, -1).astype(np.uint64)
        keys = np.zeros(bands.shape[:2], np.uint64)
        for row in range(bands.shape[2]):
            keys = mixed(keys ^ bands[:, :, row])
        return Fingerprints(keys.T.copy(), signatures)

    def is_same(self, details: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Similar enough."""
        same: np.ndarray = (details == others).mean(axis=1) >= self.threshold
        return same

    def _shingles(self, text: str) -> list[str]:
        words = _WORD.findall(text.lower())
        last = max(len(words) - self.shingle_words, 0)
        return [" ".join(words[start : start + self.shingle_words]) for start in range(last + 1)]


def write_fingerprints(documents: Iterable[tuple[int, str]], filter_: DuplicateFilter, folder: Path) -> int:
    """Write the fingerprints of a slice's documents, numbers first, to FINGERPRINTS in the folder. Returns how many."""
    import numpy as np

    numbers: list[int] = []
    found: list[Fingerprints] = []
    texts: list[str] = []
    for number, text in documents:
        numbers.append(number)
        texts.append(text)
        if len(texts) == _TEXTS_AT_ONCE:
            found.append(filter_.fingerprints(texts))
            texts = []
    if texts:
        found.append(filter_.fingerprints(texts))
    folder.mkdir(parents=True, exist_ok=True)
    if found:
        keys = np.concatenate([each.keys for each in found], axis=1)
        details = np.concatenate([each.details for each in found])
        for name, array in zip(FINGERPRINTS, (np.array(numbers, np.int64), keys, details), strict=True):
            np.save(folder / name, array)
    return len(numbers)


def find_pairs(
    folders: Sequence[Path], filter_: DuplicateFilter, column: int, part: int = 0, num_parts: int = 1
) -> np.ndarray:
    """Pairs of documents that belong together, of those with a key in common in one column.

    Args: folders: of write_fingerprints, all that wrote something. part: which of `num_parts` parts of the keys.
    Returns: (pairs, 2) int64, the less number first, without repetition.
    """
    import numpy as np

    numbers, keys, where = [], [], []
    for source, folder in enumerate(folders):
        own = np.load(folder / "keys.npy", mmap_mode="r")[column]
        rows = np.flatnonzero(own % np.uint64(num_parts) == part)
        keys.append(own[rows])
        numbers.append(np.load(folder / "numbers.npy", mmap_mode="r")[rows])
        where.append(np.stack((np.full_like(rows, source), rows), axis=1))
    key, number, place = np.concatenate(keys), np.concatenate(numbers), np.concatenate(where)
    order = np.lexsort((number, key))
    key, number, place = key[order], number[order], place[order]
    begins = np.flatnonzero(np.diff(key, prepend=key[:1] + np.uint64(1)))
    first_of = np.repeat(begins, np.diff(begins, append=len(key)))
    others = np.flatnonzero(first_of != np.arange(len(key)))
    is_same = [
        filter_.is_same(_details(folders, place[first_of[some]]), _details(folders, place[some]))
        for some in np.array_split(others, max(len(others) // _COMPARED_AT_ONCE, 1))
    ]
    others = others[np.concatenate(is_same)]
    return np.stack((number[first_of[others]], number[others]), axis=1)


_COMPARED_AT_ONCE = 1 << 16


def _details(folders: Sequence[Path], places: np.ndarray) -> np.ndarray:
    import numpy as np

    sources = places[:, 0]
    shape = np.load(folders[0] / "details.npy", mmap_mode="r")
    details = np.empty((len(places), *shape.shape[1:]), shape.dtype)
    for source in np.unique(sources).tolist():
        mine = sources == source
        details[mine] = np.load(folders[source] / "details.npy", mmap_mode="r")[places[mine, 1]]
    return details


def join_pairs(pairs: np.ndarray) -> np.ndarray:
    """Documents to leave out. Args: pairs: (pairs, 2), of documents that belong together.

    Returns: (documents, 2) int64: number of the document, and of the first of its group, which stays; sorted.
    """
    import numpy as np

    documents, ends = np.unique(pairs, return_inverse=True)
    left, right = ends.reshape(-1, 2).T
    label = np.arange(len(documents))
    while True:
        least = np.minimum(label[left], label[right])
        joined = label.copy()
        np.minimum.at(joined, left, least)
        np.minimum.at(joined, right, least)
        joined = joined[joined]
        if np.array_equal(joined, label):
            break
        label = joined
    is_left_out = label != np.arange(len(documents))
    return np.stack((documents[is_left_out], documents[label[is_left_out]]), axis=1)


def of_slice(left_out: np.ndarray, slice_index: int) -> Mapping[int, int]:
    """Number of the document that stays instead, by place in the slice. Args: left_out: of join_pairs."""
    import numpy as np

    bounds = np.searchsorted(left_out[:, 0], (number_of(slice_index, 0), number_of(slice_index + 1, 0)))
    return {place_of(number)[1]: first for number, first in left_out[slice(*bounds)].tolist()}

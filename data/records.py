"""What is noted down about shards. Quick to import: no library but pydantic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from base.config import StrictConfig

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")
IS_ANSWER, IS_SOURCE = 1, 2  # flags of a loss mask's tokens: the loss counts it; an answer is read off it


class PackingFormat(StrictConfig):
    """How the tokens in shards are to be read.

    tokenizer_sha256: None if the ids came without a tokenizer.
    has_loss_mask: whether each sample has a column that says which of its tokens are targets of the loss.
    """

    seq_len: int
    eod_id: int
    vocab_size: int
    token_dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str | None
    has_loss_mask: bool


class SplitCounts(StrictConfig):
    """What a split holds. num_tokens counts targets: the documents' tokens and one end for each, masked or not.

    num_cut_documents: those whose tokens stand in more than one sample.
    """

    num_documents: int
    num_samples: int
    num_tokens: int
    num_bytes: int
    num_cut_documents: int

    def num_padded_tokens(self, seq_len: int) -> int:
        """Positions of the samples that hold padding."""
        return self.num_samples * seq_len - self.num_tokens

    def __add__(self, other: SplitCounts) -> SplitCounts:
        return SplitCounts(**{name: getattr(self, name) + getattr(other, name) for name in SplitCounts.model_fields})


NOTHING = SplitCounts(num_documents=0, num_samples=0, num_tokens=0, num_bytes=0, num_cut_documents=0)


Reason = Literal[
    "empty",
    "invalid_utf8",
    "undecodable",
    "too_short",
    "too_long",
    "low_quality",
    "repetitive",
    "other_language",
    "contaminated",
    "duplicate",
    "near_duplicate",
    "predicate",
]
"""Why a document is left out: no text in it; the policy for invalid UTF-8; its declared encoding does not fit; or, from
too_short on, a filter."""

_IN_WORDS: dict[Reason, str] = {
    "empty": "empty",
    "invalid_utf8": "not valid UTF-8",
    "undecodable": "not in the encoding they declare",
    "too_short": "too short",
    "too_long": "too long",
    "low_quality": "of low quality",
    "repetitive": "repetitive",
    "other_language": "in another language",
    "contaminated": "with text of evaluation sets",
    "duplicate": "duplicates",
    "near_duplicate": "near duplicates",
    "predicate": "by a function of yours",
}


def reasons_in_words(left_out: Mapping[Reason, int]) -> str:
    """Counts of documents by reason, such as `3 empty, 1 not valid UTF-8`; nothing if there are none."""
    return ", ".join(f"{left_out[reason]:,} {words}" for reason, words in _IN_WORDS.items() if left_out.get(reason))


class ShardEntry(NamedTuple):
    """What an index says about a shard file."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


class Packed(StrictConfig):
    """Documents that were packed as one stream, into one folder."""

    counts: SplitCounts
    shards: tuple[ShardEntry, ...]  # relative to the folder
    documents_sha256: str  # of data.lineage.DOCUMENTS_FILE beside the shards


class HeldOut(NamedTuple):
    """Documents of a slice that are for validation, and wait to be packed with those of its neighbours.

    num_tokens: as in SplitCounts. file_bytes, sha256: of the file they wait in.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    file_bytes: int
    sha256: str


class SliceRecord(StrictConfig):
    """What write_slice wrote. Its presence in a file means that the slice's files are whole."""

    index: int
    format: PackingFormat
    left_out: dict[Reason, int]  # documents that are in no split
    positions: tuple[float, float] | None  # the least and the greatest of its documents (data.packing.position_of)
    train: Packed | None  # None: no document for training
    held_out: HeldOut | None  # None: no document for validation
    source_stamp: str = ""  # data.sources.stamp when the slice was read


class SliceRecords:
    """Records of many slices, in the order of their numbers. Each is held as JSON, in a fifth of the room."""

    def __init__(self, records: Iterable[SliceRecord] = ()) -> None:
        self._json: dict[int, bytes] = {}
        for record in records:
            self.add(record)

    def add(self, record: SliceRecord) -> None:
        self._json[record.index] = record.model_dump_json().encode()

    def __len__(self) -> int:
        return len(self._json)

    def __contains__(self, index: int) -> bool:
        return index in self._json

    def __iter__(self) -> Iterator[SliceRecord]:
        return (SliceRecord.model_validate_json(self._json[index]) for index in sorted(self._json))


class ValidationRecord(StrictConfig):
    """What write_validation wrote: documents of consecutive slices, packed as one stream."""

    index: int
    slices_sha256: str  # digest of the records of the slices (data.packing.ValidationStream)
    valid: Packed


RECORDS: dict[Split, str] = {"train": "slices", "valid": "validation_streams"}
"""Folders of the records of what was packed for a split, beside the folders of the splits."""


def record_name(split: Split, number: int) -> str:
    """The file of the record of a slice, or of a validation stream."""
    return f"{RECORDS[split]}/{number:05d}.json"


class ShardsSummary(StrictConfig):
    """A finished set of shards."""

    format: PackingFormat
    counts: dict[Split, SplitCounts]
    left_out: dict[Reason, int]
    index_sha256: dict[Split, str]  # identity of each split's content

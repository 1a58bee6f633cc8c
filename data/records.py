"""What is noted down about shards. Quick to import: no library but pydantic."""

from __future__ import annotations

from typing import Any, Literal

from data.config import StrictConfig

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


class PackingFormat(StrictConfig):
    """How the tokens in shards are to be read."""

    seq_len: int
    eod_id: int
    vocab_size: int
    token_dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str


class SplitCounts(StrictConfig):
    """What a split holds. num_tokens counts targets: the documents' tokens and one end for each."""

    num_documents: int
    num_samples: int
    num_tokens: int
    num_bytes: int

    def __add__(self, other: SplitCounts) -> SplitCounts:
        return SplitCounts(**{name: getattr(self, name) + getattr(other, name) for name in SplitCounts.model_fields})


NOTHING = SplitCounts(num_documents=0, num_samples=0, num_tokens=0, num_bytes=0)


class SliceRecord(StrictConfig):
    """What write_slice wrote. Its presence in a file means that the slice's shards are whole."""

    index: int
    format: PackingFormat
    counts: dict[Split, SplitCounts]
    left_out: dict[str, int]  # documents that are in no split, by reason (data.sources.document.Reason)
    shards: dict[Split, tuple[dict[str, Any], ...]]  # entries of an MDS index, relative to the split's folder


class ShardsSummary(StrictConfig):
    """A finished set of shards."""

    format: PackingFormat
    counts: dict[Split, SplitCounts]
    left_out: dict[str, int]
    index_sha256: dict[Split, str]  # identity of each split's content

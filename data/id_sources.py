"""Settings of sources whose documents are token ids already: arrays of ids, bytes, and tasks that are made up."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from base.config import ADDED_LATER, StrictConfig
from data.tasks import AnyTask

MIB = 1 << 20


class Vocabulary(NamedTuple):
    """The ids of a source that has its own.

    Attributes:
        size: number of ids, the end of a document included.
        has_loss_mask: whether documents say which of their tokens the loss counts.
    """

    size: int
    eod_id: int
    has_loss_mask: bool = False


class SourceConfig(StrictConfig):
    """What all sources have."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Its own token ids; None: it holds text, which a tokenizer makes ids of."""
        return None


def _one_path_is_a_list_of_one(paths: Any) -> Any:
    return (paths,) if isinstance(paths, str) else paths


Paths = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_path_is_a_list_of_one), Field(min_length=1)
]

_PATHS = "Files or globs (`**` descends), read in this order, a glob's matches sorted."


class TokensSource(SourceConfig):
    """Token ids in .npy and raw files, as nanoGPT, OLMo-core, Megatron-LM and numpy write them. Needs no tokenizer."""

    kind: Literal["tokens"]
    paths: Paths = Field(
        description=f"{_PATHS} .npy files as numpy saves them, each row of a two-dimensional array being a document; "
        "all others as plain ids one after another. If a file NAME.idx of Megatron-LM stands beside NAME.bin, it says "
        "the type of the ids and where documents are.",
    )
    vocab_size: int = Field(ge=1, le=2**31, description="Number of ids; a larger one in a file is an error.")
    dtype: Literal["uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64"] = Field(
        "uint16", description="Type of the ids in files that do not tell it themselves; little-endian."
    )
    eod_id: int | None = Field(
        None,
        ge=0,
        description="Id that keeps documents apart in the files; several in a row count as one. Left out: no id does, "
        "and vocab_size becomes the id of ends, one more than the ids there are.",
    )
    document_tokens: int = Field(
        16 * MIB,
        ge=1,
        description="Longest document: longer ones, and files in which nothing keeps documents apart, are cut into "
        "documents of this many ids.",
    )

    @model_validator(mode="after")
    def _eod_is_an_id(self) -> Self:
        if self.eod_id is not None and self.eod_id >= self.vocab_size:
            raise ValueError(
                f"eod_id={self.eod_id} is none of the {self.vocab_size} ids from 0 on (vocab_size). Raise vocab_size, "
                "or leave eod_id out if no id in the files ends a document."
            )
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        """As the files have it; an id for the ends of documents is added if they have none."""
        if self.eod_id is None:
            return Vocabulary(self.vocab_size + 1, self.vocab_size)
        return Vocabulary(self.vocab_size, self.eod_id)


class BytesSource(SourceConfig):
    """The bytes of any files as token ids 0 to 255; 256 ends a document. Needs no tokenizer."""

    kind: Literal["bytes"]
    paths: Paths = Field(
        description=f"{_PATHS} Also URLs of stores. A file that several names or links lead to is read once."
    )
    document_bytes: int = Field(
        16 * MIB,
        ge=1,
        description="Longest document: a longer file is cut into documents of this many bytes. Name the size of a "
        "record if the files consist of such.",
    )

    @property
    def vocabulary(self) -> Vocabulary:
        """The 256 bytes and the end of a document."""
        return Vocabulary(257, 256)


class SyntheticSource(SourceConfig):
    """Documents made up for a task, with the loss on its answers only. Needs no tokenizer."""

    kind: Literal["synthetic"]
    task: AnyTask = Field(description="What a document asks.")
    num_documents: int = Field(ge=1, le=2**40, description="Documents in both splits together, each drawn by itself.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the documents.")
    mark_sources: bool = Field(
        False,
        description="Note down where each answer is read off. Training with model.selection=oracle needs it.",
        json_schema_extra=ADDED_LATER,
    )

    @property
    def vocabulary(self) -> Vocabulary:
        """The task's ids, and one more for the ends of documents."""
        return Vocabulary(self.task.num_ids + 1, self.task.num_ids, has_loss_mask=True)

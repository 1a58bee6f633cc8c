"""Settings of the data stages, each described once. The pipeline's stage configs inherit these fields."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from base.config import StrictConfig
from data.id_sources import MIB, BytesSource, Paths, SourceConfig, SyntheticSource, TokensSource

InvalidUtf8 = Literal["error", "replace", "skip_document"]
Packing = Literal["stream", "best_fit"]
FileFormat = Literal["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
FORMAT_OF_SUFFIX: dict[str, FileFormat] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".json": "jsonl",
    ".json.gz": "jsonl.gz",
    ".json.zst": "jsonl.zst",
    ".parquet": "parquet",
}
"""What a file's name says about it, in either case. A .json file holds JSON lines, as those of C4 and Dolma do."""


_InvalidUtf8Field = Annotated[
    InvalidUtf8,
    Field(
        description="What to do with a document that is not valid UTF-8: stop with an error, put U+FFFD in place of "
        "the bad bytes, or leave the document out."
    ),
]


class FilesSource(SourceConfig):
    """Text files; the suffix says the format."""

    kind: Literal["files"]
    paths: Paths = Field(
        description="Files or globs (`**` descends), read in this order, a glob's matches sorted; also URLs of stores "
        "(s3://, gs:// and what else fsspec reaches). "
        "Formats: .txt (one file is one document); .jsonl or .json, plain or as .gz or .zst (one JSON object per "
        "line); .parquet. A file that several names or links lead to is read once.",
    )
    text_field: str = Field(
        "text", min_length=1, description="Field (.jsonl) or column (.parquet) that holds the text."
    )
    invalid_utf8: _InvalidUtf8Field = "error"
    max_txt_document_bytes: int = Field(
        16 * MIB,
        ge=1024,
        description="A .txt file longer than this is cut at line ends into documents of about this size, so that "
        "memory stays bounded and several workers can share the file.",
    )


class HuggingFaceSource(SourceConfig):
    """A data set of the Hugging Face Hub (needs the network), or a folder in its layout. Needs the `hf` extra."""

    kind: Literal["huggingface"]
    dataset: str = Field(min_length=1, description="Id on the Hub (`owner/name`), or a local folder.")
    name: str | None = Field(None, description="Configuration of the data set, where it has several.")
    split: str = Field("train", min_length=1, description="Split to read; slices such as `train[:1%]` work.")
    revision: str | None = Field(None, description="Commit, tag or branch. A commit makes the run repeatable forever.")
    text_field: str = Field("text", min_length=1, description="Column that holds the text.")
    invalid_utf8: _InvalidUtf8Field = "error"


class PythonStdlibSource(SourceConfig):
    """The Python standard library's own .py files: about 12 MB of real text that every machine has."""

    kind: Literal["python_stdlib"]
    include_tests: bool = Field(False, description="Also read the library's test suites (more than doubles the text).")


TextSource = Annotated[FilesSource | HuggingFaceSource | PythonStdlibSource, Field(discriminator="kind")]
Source = Annotated[
    FilesSource | HuggingFaceSource | PythonStdlibSource | TokensSource | BytesSource | SyntheticSource,
    Field(discriminator="kind"),
]


class TokenizerFields(StrictConfig):
    """A byte-level BPE tokenizer: trained on the source, or loaded."""

    source: TextSource | None = Field(None, description="Text to train the tokenizer on. Give this or `load`.")
    load: str | None = Field(
        None, description="Folder with (or path of) a tokenizer.json to take instead of training; byte-level BPE only."
    )
    vocab_size: int = Field(
        8192,
        ge=257,
        le=2**20,
        description="Largest number of token ids: 256 bytes, the end-of-document token, and merges. "
        "A small text may yield fewer. Not used with `load`.",
    )
    sample_bytes: int = Field(
        64 * MIB,
        ge=1,
        description="Train on at most about this much text: whole documents from all over the source, also from inside "
        "compressed files.",
    )
    end_of_document: str = Field(
        "<|endoftext|>", min_length=1, description="Name of the special token that keeps documents apart."
    )

    @model_validator(mode="after")
    def _trained_or_loaded(self) -> Self:
        if (self.source is None) == (self.load is None):
            found = "neither" if self.source is None else "both"
            raise ValueError(
                f"found {found} of source and load, expected exactly one: train on a source, or load a tokenizer."
            )
        return self


class PackingFields(StrictConfig):
    """How token ids become samples and shards."""

    seq_len: int = Field(ge=2, le=2**24, description="Tokens the model reads at once.")
    packing: Packing = Field(
        "stream",
        description="How documents are put into sequences. `stream`: one behind the other, cut wherever a sequence is "
        "full; nearly no padding. `best_fit`: documents that fit into a sequence are not cut, and sequences are padded "
        "where no further document fits. The number of documents cut and of tokens padded is reported for both.",
    )
    validation_fraction: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of the documents kept for validation. The hash of a document's content decides, so equal "
        "documents never end up on both sides.",
    )
    shard_bytes: int = Field(
        64 * MIB,
        ge=4096,
        lt=2**32,
        description="Largest shard file.",
    )


class TokenizeFields(PackingFields):
    """Text to token ids, packed into sequences and written as MDS shards."""

    source: Source = Field(description="Text to tokenize, or documents that are token ids already.")
    slice_bytes: int | None = Field(
        None,
        ge=1024,
        description="Text one task handles, about; the unit of parallel work and of resuming. Default: 1/128 of the "
        "source, at least 8 MiB and 256 bytes for each token of seq_len, at most 512 MiB. So a small source still "
        "spreads over many workers, and a large one fills shards up to shard_bytes. The size follows from the source "
        "and seq_len alone: any number of workers writes the same bytes.",
    )

"""What a `tokenize` stage wrote: samples as text, what a split holds, and whether every byte is as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from base.errors import DamagedError, UserError
from data.errors import DataError
from data.records import IS_ANSWER, SPLITS, Split
from pipelines.api.finding import require_kind
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.stages.tokenize.stage import TokenizeStage
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from data.shards import TokenSplit
    from data.tokenizer import Tokenizer

_LENGTH_STEPS = 4  # bins of the histogram per power of ten


class Piece(Facts):
    """A document, or the part of one that stands in a sample."""

    document: str  # name: path and byte, line or row
    first_byte: int | None  # of the whole document in its file; null: not known
    end_byte: int | None
    first_token: int  # of the document; more than 0 if it began in an earlier sample
    num_tokens: int  # of the document in this sample
    document_tokens: int  # of the whole document, without its end
    tokens: tuple[str, ...]  # as text, bytes that are no UTF-8 alone as \\xNN; the end-of-document token by its name


class ShownSample(Facts):
    """One sequence of training or validation."""

    split: Split
    sample: int  # its number in the split
    shard: str
    in_shard: int
    num_padded: int
    pieces: tuple[Piece, ...]


class LengthBin(Facts):
    """How many documents have at least `at_least` and less than `less_than` tokens, their end included."""

    at_least: int
    less_than: int
    num_documents: int


class SplitStatistics(Facts):
    """What a split holds."""

    split: Split
    num_documents: int
    num_samples: int
    num_tokens: int
    num_bytes: int
    bytes_per_token: float
    num_shards: int
    shard_bytes: int  # of all together
    padded_share: float  # of the positions of all samples
    cut_share: float  # of the documents: those that stand in more than one sample
    document_tokens: dict[str, int]  # quantiles of the length: min, 10 %, 50 %, 90 %, max
    lengths: tuple[LengthBin, ...]


class Checked(NamedTuple):
    """A file that was compared with its digest; `problem` is None if it is as it was written."""

    name: str
    num_bytes: int
    problem: str | None


class VerifyReport(Facts):
    """Files that were compared with their digests."""

    num_files: int
    num_bytes: int  # of the shards
    problems: tuple[str, ...]  # a text per file that is not as it was written


def tokens_artifact(run: Run, stage: str) -> ArtifactDir:
    """The artifact of a finished `tokenize` stage. Raises UserError: it is of another kind, or not finished."""
    require_kind(run, stage, TokenizeStage.kind)
    artifact = run.artifact_of(run.stored_state().stages[stage])
    if artifact is None:
        raise UserError(f"Stage {stage} of run {run.run_id} is not finished. Run the pipeline first.")
    return artifact


def show_samples(artifact: ArtifactDir, split: Split, samples: Sequence[int]) -> Iterator[ShownSample]:
    """Samples by their numbers in the split. Raises UserError: there is none of a number."""
    from pipelines.stages.tokenize.reading import token_split

    tokens = token_split(artifact, split)
    tokenizer = None if tokens.index.format.tokenizer_sha256 is None else _tokenizer(artifact)
    for number in samples:
        if not 0 <= number < tokens.index.counts.num_samples:
            raise UserError(
                f"The {split} split has no sample {number}: its samples are 0 to {tokens.index.counts.num_samples - 1}."
            )
        yield _show(tokens, tokenizer, number)


def statistics(artifact: ArtifactDir) -> Iterator[SplitStatistics]:
    """What each split holds. Reads the tables of documents, not the shards."""
    import numpy as np

    from data.lineage import read_documents

    for split in SPLITS:
        tokens = _split(artifact, split)
        if tokens is None:
            continue
        index = tokens.index
        lengths = np.sort(np.concatenate([rows["num_tokens"] + 1 for rows in read_documents(tokens)]))
        counts, seq_len = index.counts, index.format.seq_len
        quantiles = {"min": 0.0, "10 %": 0.1, "50 %": 0.5, "90 %": 0.9, "max": 1.0}
        ends = np.unique(np.round(10 ** (np.arange(0, 10 * _LENGTH_STEPS) / _LENGTH_STEPS)).astype(np.int64))
        found = np.searchsorted(lengths, ends)
        bins = [
            LengthBin(at_least=low, less_than=high, num_documents=num)
            for low, high, num in zip(ends[:-1].tolist(), ends[1:].tolist(), np.diff(found).tolist(), strict=True)
        ]
        used = [number for number, each in enumerate(bins) if each.num_documents]
        yield SplitStatistics(
            split=split,
            num_documents=counts.num_documents,
            num_samples=counts.num_samples,
            num_tokens=counts.num_tokens,
            num_bytes=counts.num_bytes,
            bytes_per_token=counts.num_bytes / counts.num_tokens,
            num_shards=len(index),
            shard_bytes=index.num_bytes,
            padded_share=counts.num_padded_tokens(seq_len) / (counts.num_samples * seq_len),
            cut_share=counts.num_cut_documents / counts.num_documents,
            document_tokens={
                name: int(lengths[min(int(share * len(lengths)), len(lengths) - 1)])
                for name, share in quantiles.items()
            },
            lengths=tuple(bins[used[0] : used[-1] + 1]),
        )


def num_files(artifact: ArtifactDir) -> int:
    """How many files verify() compares."""
    import numpy as np

    splits = [tokens for split in SPLITS if (tokens := _split(artifact, split)) is not None]
    return sum(len(tokens.index) + len(np.unique(tokens.index.folders)) for tokens in splits)


def verify(artifact: ArtifactDir) -> Iterator[Checked]:
    """Compare every shard and table of documents with its digest; one that is damaged does not end it.

    Raises: DataError, DamagedError: there is no index to compare with, or it is damaged itself.
    """
    from data.lineage import document_tables

    for split in SPLITS:
        tokens = _split(artifact, split)
        if tokens is None:
            continue
        for number in range(len(tokens.index)):
            entry = tokens.index.entry(number)
            problem = None
            try:
                tokens.open_shard(number)
            except DamagedError as error:
                problem = str(error)
            yield Checked(f"{split}/{entry.name}", entry.num_bytes, problem)
        for name, problem in document_tables(tokens):
            yield Checked(name, 0, problem)


def _split(artifact: ArtifactDir, split: Split) -> TokenSplit | None:
    """A split; None if it is the one for validation and empty. Raises DataError, DamagedError: there is no index."""
    from pipelines.stages.tokenize.reading import token_split

    tokens = token_split(artifact, split)
    try:
        tokens.index  # noqa: B018  # read now
    except DataError:
        if split == "train":
            raise
        return None
    return tokens


def _tokenizer(artifact: ArtifactDir) -> Tokenizer:
    from data.tokenizer import load_tokenizer

    return load_tokenizer(artifact.fetch(TOKENIZER_FOLDER))


def _show(tokens: TokenSplit, tokenizer: Tokenizer | None, number: int) -> ShownSample:
    from data.lineage import documents_of, place_of

    (sample,) = tokens.samples(number, number + 1)
    targets = sample["tokens"][1:].tolist()
    counts = (sample["loss_mask"][1:] & IS_ANSWER).tolist() if "loss_mask" in sample else [0] * len(targets)
    eod_id = tokens.index.format.eod_id
    texts = [
        _text(tokenizer, target) if tokenizer else _number(target, bool(is_answer), eod_id)
        for target, is_answer in zip(targets, counts, strict=True)
    ]
    place = place_of(tokens.index, number)
    pieces = [
        Piece(
            document=part.id,
            first_byte=part.start,
            end_byte=part.end,
            first_token=part.tokens.start,
            num_tokens=len(part.targets),
            document_tokens=part.num_tokens,
            tokens=tuple(texts[target] for target in part.targets),
        )
        for part in documents_of(tokens, number)
    ]
    return ShownSample(
        split=tokens.split,
        sample=number,
        shard=place.shard,
        in_shard=place.in_shard,
        num_padded=tokens.index.format.seq_len - sum(piece.num_tokens for piece in pieces),
        pieces=tuple(pieces),
    )


def _number(token: int, is_answer: bool, eod_id: int) -> str:
    """An id that is no text: `=` before one that the loss counts, if it counts some only."""
    return "end " if token == eod_id else f"{'=' * is_answer}{token} "


def _text(tokenizer: Tokenizer, token: int) -> str:
    if token == tokenizer.eod_id:
        return tokenizer.end_of_document
    return tokenizer.decode([token]).decode("utf-8", "backslashreplace")

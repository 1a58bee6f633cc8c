"""The `tokenize` stage: text to packed token ids in MDS shards, slice by slice in Ray tasks.

In the artifact: {train,valid}/slice-NNNNN/*.mds and slices/NNNNN.json, the record that makes a slice count as done; at
the end {train,valid}/index.json, which make a data set of them, and a copy of the tokenizer.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from base.errors import DamagedError, UserError
from data.config import TokenizeFields
from data.records import NOTHING, SPLITS, Reason, ShardsSummary, SliceRecord, reasons_in_words
from data.sources import Slice, content_identity, duplicate_files, local_paths, plan_slices, stamp, with_absolute_paths
from pipelines.engine.stage import (
    ProgressMetrics,
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.faults import explained_disk
from pipelines.stages.tasks import require_planned_content, run_tasks, user_errors
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER, TokenizerStage, describe_source
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

_RECORDS_FOLDER = "slices"
_LOG_EVERY_S = 1.0
_NOTICEABLE_SHARE = 0.01

logger = logging.getLogger(__name__)


class TokenizeStageConfig(StageConfig, TokenizeFields):
    """Tokenize text with the tokenizer of the stage in `needs`."""

    kind: Literal["tokenize"]


class TokenizeOutput(StageOutput):
    """Content of the shards. Tokens count targets: the documents' tokens and one end for each document."""

    seq_len: int
    vocab_size: int = Field(description="Number of the tokenizer's ids.")
    eod_id: int = Field(description="Id of the end-of-document token.")
    token_dtype: str
    tokenizer_sha256: str
    num_slices: int
    num_train_documents: int
    num_train_samples: int
    num_train_tokens: int
    num_train_bytes: int = Field(description="Bytes of the text, in UTF-8.")
    num_valid_documents: int
    num_valid_samples: int
    num_valid_tokens: int
    num_valid_bytes: int
    left_out: dict[Reason, int] = Field(
        description="Documents in neither split, by reason: `empty` (no text), `invalid_utf8` (left out by "
        "source.invalid_utf8), `undecodable` (not in the encoding they declare)."
    )
    num_duplicate_files: int = Field(description="Names in the source that lead to a file already read.")
    train_sha256: str = Field(description="Identity of the training split's content.")
    valid_sha256: str | None = Field(description="Identity of the validation split's content; null: it is empty.")

    def summary(self) -> str:
        """The documents: in which split, and how many in none, by reason."""
        text = (
            f"{self.num_train_documents:,} documents for training ({self.num_train_tokens:,} tokens), "
            f"{self.num_valid_documents:,} for validation ({self.num_valid_tokens:,} tokens)"
        )
        text += "; left out: " + (reasons_in_words(self.left_out) or "none")
        if self.num_duplicate_files:
            text += f"; names that lead to files already read: {self.num_duplicate_files:,}"
        return text


@dataclass(frozen=True)
class TokenizeInputs(StageInputs):
    """Inputs of a `tokenize` stage."""

    tokenizer: StageNode[TokenizerStage]


class TokenizeStage(Stage[TokenizeStageConfig, TokenizeInputs, TokenizeOutput]):
    """Finished slices are kept between attempts; one that was being written is written again."""

    code_version = 3
    progress = ProgressMetrics("tokenize/slices_total", {"tokenize/tokens_per_s": "{:,.0f} tokens/s"})

    def mark(self, config: TokenizeStageConfig, artifact: ArtifactDir) -> int:
        """Number of slices written."""
        return len(artifact.listdir(_RECORDS_FOLDER))

    def content_identity(self, config: TokenizeStageConfig) -> str:
        """Digest of the text. Raises UserError where it is missing."""
        with user_errors():
            return content_identity(config.source)

    def local_paths(self, config: TokenizeStageConfig) -> tuple[str, ...]:
        """The text."""
        return local_paths(config.source)

    def run(self, config: TokenizeStageConfig, inputs: TokenizeInputs, context: StageContext) -> TokenizeOutput:
        """Write the shards. Raises UserError: the text is invalid, or there is none for a split."""
        from data.index import TABLE_FILE
        from data.packing import INDEX_FILE, merge_slices

        tokenizer, artifact = inputs.tokenizer, context.artifact
        config = config.model_copy(update={"source": with_absolute_paths(config.source)})
        with user_errors():
            source_stamp = stamp(config.source)
        digest = self.content_identity(config)
        require_planned_content(context, digest)
        context.journal.log_dataset(context.name, digest, describe_source(config.source), context="tokenize")
        with user_errors(artifact.local):
            slices = plan_slices(config.source, config.slice_bytes)
            duplicates = duplicate_files(config.source)
            records = self._tokenize(slices, config, tokenizer, source_stamp, context)
            if stamp(config.source) != source_stamp:
                raise UserError(
                    f"stages.{context.name}: the files it reads were changed or touched while they were read. Nothing "
                    "was recorded. Leave them alone while a run reads them, and run again."
                )
            summary = merge_slices(artifact.local, records, config)
            for split in summary.index_sha256:
                artifact.publish(f"{split}/{INDEX_FILE}")
                artifact.publish(f"{split}/{TABLE_FILE}")
            tokenizer_folder = tokenizer.artifact.fetch(TOKENIZER_FOLDER)
            shutil.copytree(tokenizer_folder, artifact.local / TOKENIZER_FOLDER, dirs_exist_ok=True)
            artifact.publish(TOKENIZER_FOLDER)
        output = _output(summary, len(slices), duplicates)
        _report_left_out(output, duplicates, context)
        return output

    def _tokenize(
        self,
        slices: list[Slice],
        config: TokenizeStageConfig,
        tokenizer: StageNode[TokenizerStage],
        source_stamp: str,
        context: StageContext,
    ) -> list[SliceRecord]:
        """Write the slices that are not yet written from these files by this tokenizer. Returns the records of all."""
        artifact, journal = context.artifact, context.journal
        sha256 = tokenizer.output.sha256
        records = _finished_slices(artifact, source_stamp, sha256)
        finished = {record.index for record in records}
        calls = [
            (slice_, config, tokenizer.artifact, sha256, source_stamp, artifact)
            for slice_ in slices
            if slice_.index not in finished
        ]
        done = sum((counts for record in records for counts in record.counts.values()), NOTHING)
        num_reused, tokens_reused = len(records), done.num_tokens
        journal.log_metrics(num_reused, {"tokenize/slices_total": len(slices), "tokenize/slices_done": num_reused})
        started = logged = time.monotonic()
        for record in run_tasks(_tokenize_slice, calls, config.resources):
            records.append(record)
            done = sum(record.counts.values(), done)
            now = time.monotonic()
            if now - logged < _LOG_EVERY_S and len(records) < len(slices):
                continue
            logged = now
            journal.log_metrics(
                len(records),
                {
                    "tokenize/slices_done": len(records),
                    "tokenize/tokens": done.num_tokens,
                    "tokenize/tokens_per_s": (done.num_tokens - tokens_reused) / (now - started),
                    "tokenize/bytes_per_token": done.num_bytes / max(done.num_tokens, 1),
                },
            )
        return records


def _tokenize_slice(
    slice_: Slice,
    config: TokenizeStageConfig,
    tokenizer: ArtifactDir,
    tokenizer_sha256: str,
    source_stamp: str,
    artifact: ArtifactDir,
) -> SliceRecord:
    """Runs as a Ray task. Raises DataError. The record is written last: with it the slice is done."""
    from data.index import folder_name
    from data.packing import write_slice

    with explained_disk(artifact.local):
        record = write_slice(slice_, _load_tokenizer(tokenizer, tokenizer_sha256), config, artifact.local)
    record = record.model_copy(update={"source_stamp": source_stamp})
    for split in SPLITS:
        if record.shards[split]:
            artifact.publish(f"{split}/{folder_name(slice_.index)}")
    artifact.write_json(f"{_RECORDS_FOLDER}/{slice_.index:05d}.json", record.model_dump(mode="json"))
    return record


_loaded_tokenizers: dict[
    tuple[str, str], Tokenizer
] = {}  # by URL and digest: a worker process does many slices with one tokenizer


def _load_tokenizer(artifact: ArtifactDir, sha256: str) -> Tokenizer:
    from data.tokenizer import load_tokenizer

    if (artifact.url, sha256) not in _loaded_tokenizers:
        tokenizer = load_tokenizer(artifact.fetch(TOKENIZER_FOLDER))
        if tokenizer.sha256 != sha256:
            raise DamagedError(
                f"{artifact.url}/{TOKENIZER_FOLDER}: another tokenizer than its stage made (digest "
                f"{tokenizer.sha256[:16]}..., expected {sha256[:16]}...). {artifact.remedy}"
            )
        _loaded_tokenizers[artifact.url, sha256] = tokenizer
    return _loaded_tokenizers[artifact.url, sha256]


def _finished_slices(artifact: ArtifactDir, source_stamp: str, tokenizer_sha256: str) -> list[SliceRecord]:
    """The records of slices written from these files by this tokenizer; those of others are removed.

    Raises: DamagedError: a record is not as it was written.
    """
    finished = []
    for name in artifact.listdir(_RECORDS_FOLDER):
        relpath = f"{_RECORDS_FOLDER}/{name}"
        try:
            record = SliceRecord.model_validate(artifact.read_json(relpath))
        except ValidationError as error:
            raise DamagedError(
                f"{artifact.url}/{relpath}: of another version of this program. Delete it to have the slice written "
                "again."
            ) from error
        if record.source_stamp == source_stamp and record.format.tokenizer_sha256 == tokenizer_sha256:
            finished.append(record)
        else:
            artifact.delete(relpath)
    return finished


def _report_left_out(output: TokenizeOutput, duplicates: list[str], context: StageContext) -> None:
    """Tell MLflow how many documents and files were left out and why, and the user if it is a noticeable share."""
    figures = {f"tokenize/left_out_{reason}": float(count) for reason, count in output.left_out.items()}
    context.journal.log_metrics(0, figures | {"tokenize/duplicate_files": float(output.num_duplicate_files)})
    num_left_out = sum(output.left_out.values())
    num_documents = num_left_out + output.num_train_documents + output.num_valid_documents
    if num_left_out > _NOTICEABLE_SHARE * num_documents:
        reasons = reasons_in_words(output.left_out)
        logger.warning("%s: %d of %d documents were left out: %s.", context.name, num_left_out, num_documents, reasons)
    if duplicates:
        logger.warning(
            "%s: %d names in the source lead to files that were already read, and are not read again: %s%s.",
            context.name, len(duplicates), ", ".join(duplicates[:3]), ", ..." if len(duplicates) > 3 else "",
        )  # fmt: skip


def _output(summary: ShardsSummary, num_slices: int, duplicates: list[str]) -> TokenizeOutput:
    counts: dict[str, Any] = {
        f"num_{split}_{name.removeprefix('num_')}": value
        for split in SPLITS
        for name, value in summary.counts[split].model_dump().items()
    }
    return TokenizeOutput(
        **summary.format.model_dump(),
        **counts,
        left_out=summary.left_out,
        num_duplicate_files=len(duplicates),
        num_slices=num_slices,
        train_sha256=summary.index_sha256["train"],
        valid_sha256=summary.index_sha256.get("valid"),
    )

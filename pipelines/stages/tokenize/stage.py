"""The `tokenize` stage: text, or ids that there are, to packed token ids in MDS shards, slice by slice in Ray tasks.

In the artifact: {train,valid}/slice-NNNNN/ with shards and the table of their documents. A slice counts as done by its
record slices/NNNNN.json; its documents for validation wait in held_out/NNNNN.parquet. Those of many slices are packed
together, with the record validation_streams/NNNNN.json. At the end come the indexes {train,valid}/shards.table (for
other programs index.json), which make a data set of the shards. The tokenizer, if there is one, is copied first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from base.errors import UserError
from data.config import PackingFields, TokenizeFields
from data.filters import FilterFields
from data.records import RECORDS, SPLITS, Reason, ShardsSummary, reasons_in_words
from data.sources import (
    content_identity,
    duplicate_files,
    local_paths,
    plan_slices,
    slice_bytes_of,
    stamp,
    with_absolute_paths,
)
from pipelines.engine.stage import (
    Content,
    ProgressMetrics,
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.errors import FieldError
from pipelines.stages.sections import Section
from pipelines.stages.tasks import require_planned_content, user_errors
from pipelines.stages.tokenize.screening import code_of, compare_documents, content_of, files_of, ship
from pipelines.stages.tokenize.section import data_section
from pipelines.stages.tokenize.stored_tokenizer import store_tokenizer
from pipelines.stages.tokenize.writing import write_slices, write_validation_streams
from pipelines.stages.tokenizer.stage import TokenizerStage, describe_source
from pipelines.storage.artifact import ArtifactDir

_NOTICEABLE_SHARE = 0.01

logger = logging.getLogger(__name__)


class TokenizeStageConfig(StageConfig, TokenizeFields, FilterFields):
    """Tokenize text with the tokenizer of the stage in `needs`; or pack token ids, which need none."""

    kind: Literal["tokenize"]


class TokenizeOutput(StageOutput):
    """Content of the shards. Tokens count targets: the documents' tokens and one end for each document."""

    seq_len: int
    vocab_size: int = Field(description="Number of token ids.")
    eod_id: int = Field(description="Id of the end-of-document token.")
    token_dtype: str
    tokenizer_sha256: str | None = Field(description="Identity of the tokenizer; null: the ids are no text.")
    has_loss_mask: bool = Field(description="Whether the loss counts only answers, and not all of these tokens.")
    num_slices: int
    num_train_documents: int
    num_train_samples: int
    num_train_tokens: int
    num_train_bytes: int = Field(description="Bytes of the text, in UTF-8; 0 if the ids are no text.")
    num_train_cut_documents: int = Field(description="Documents whose tokens stand in more than one sequence.")
    num_train_padded_tokens: int = Field(description="Positions of sequences that hold padding.")
    num_valid_documents: int
    num_valid_samples: int
    num_valid_tokens: int
    num_valid_bytes: int
    num_valid_cut_documents: int
    num_valid_padded_tokens: int
    left_out: dict[Reason, int] = Field(
        description="Documents in neither split, by reason: `empty` (no text), `invalid_utf8` (left out by "
        "source.invalid_utf8), `undecodable` (not in the encoding they declare), and those of filters."
    )
    num_duplicate_files: int = Field(description="Names in the source that lead to a file already read.")
    train_sha256: str = Field(description="Identity of the training split's content.")
    valid_sha256: str | None = Field(description="Identity of the validation split's content; null: it is empty.")

    @property
    def is_text(self) -> bool:
        """Whether there is a tokenizer to read the ids by."""
        return self.tokenizer_sha256 is not None

    def summary(self) -> str:
        """The documents: in which split, how many are cut, and how many are in none, by reason; and the padding."""
        text = (
            f"{self.num_train_documents:,} documents for training ({self.num_train_tokens:,} tokens), "
            f"{self.num_valid_documents:,} for validation ({self.num_valid_tokens:,} tokens)"
        )
        text += f"; cut: {self.num_train_cut_documents + self.num_valid_cut_documents:,} documents"
        text += f"; padding: {self._padded_share():.2%}"
        text += "; left out: " + (reasons_in_words(self.left_out) or "none")
        if self.num_duplicate_files:
            text += f"; names that lead to files already read: {self.num_duplicate_files:,}"
        return text

    def _padded_share(self) -> float:
        num_padded = self.num_train_padded_tokens + self.num_valid_padded_tokens
        return num_padded / ((self.num_train_samples + self.num_valid_samples) * self.seq_len)


@dataclass(frozen=True)
class TokenizeInputs(StageInputs):
    """Inputs of a `tokenize` stage. `tokenizer`: for text; none if the source has token ids of its own."""

    tokenizer: StageNode[TokenizerStage] | None = None


class TokenizeStage(Stage[TokenizeStageConfig, TokenizeInputs, TokenizeOutput]):
    """Finished slices are kept between attempts; one that was being written is written again."""

    code_version = 5
    progress = ProgressMetrics("tokenize/slices_total", {"tokenize/tokens_per_s": "{:,.0f} tokens/s"})

    def mark(self, config: TokenizeStageConfig, artifact: ArtifactDir) -> int:
        """Number of slices and validation streams written."""
        return sum(len(artifact.listdir(folder)) for folder in RECORDS.values())

    def check(self, name: str, config: TokenizeStageConfig, inputs: TokenizeInputs) -> None:
        """Refuse text without a tokenizer, and token ids with one."""
        has_ids = config.source.vocabulary is not None
        if has_ids and inputs.tokenizer is not None:
            raise FieldError(
                ("stages", name, "source"),
                f"kind {config.source.kind!r} has token ids already, but `needs` names the tokenizer "
                f"{inputs.tokenizer.name!r}. Remove it there, or give a source of text.",
            )
        if has_ids and config.filters:
            raise FieldError(
                ("stages", name, "filters"),
                f"look at text, and a source of kind {config.source.kind!r} has none. Remove them.",
            )
        if not has_ids and inputs.tokenizer is None:
            raise FieldError(
                ("stages", name, "needs"),
                f"names no stage of kind tokenizer, which a source of text (kind {config.source.kind!r}) needs. Add "
                "one; a source of kind bytes needs none.",
            )

    def content_identity(self, config: TokenizeStageConfig) -> Content:
        """Digest of the text; with it those of what filters read. Raises UserError where something is missing."""
        with user_errors():
            text, filters = content_identity(config.source), content_of(config.filters)
        return {"text": text, **filters} if filters else text

    def local_paths(self, config: TokenizeStageConfig) -> tuple[str, ...]:
        """The text, and files that filters read."""
        return (*local_paths(config.source), *files_of(config.filters))

    def code_files(self, config: TokenizeStageConfig) -> list[Path]:
        """The modules of filters that are functions of the user's."""
        return [file.path for sources in code_of(config.filters) for file in sources.files]

    def section(self, node: StageNode[Self]) -> Section:
        """Its splits, and what was left out."""
        return data_section(node)

    def run(self, config: TokenizeStageConfig, inputs: TokenizeInputs, context: StageContext) -> TokenizeOutput:
        """Write the shards. Raises UserError: the text is invalid, or there is none for a split."""
        from data.index import TABLE_FILE
        from data.merging import INDEX_FILE, check_slices, merge
        from data.packing import plan_validation

        artifact = context.artifact
        config = config.model_copy(update={"source": with_absolute_paths(config.source)})
        with user_errors():
            source_stamp = stamp(config.source)
        digest = self.content_identity(config)
        require_planned_content(context, digest)
        of_text = digest if isinstance(digest, str) else digest["text"]
        context.journal.log_dataset(context.name, of_text, describe_source(config.source), context="tokenize")
        with user_errors(artifact.local):
            tokenizer = store_tokenizer(config, inputs.tokenizer, artifact)
            slices = plan_slices(config.source, slice_bytes_of(config))
            duplicates = duplicate_files(config.source)
            fields = PackingFields(**{name: getattr(config, name) for name in PackingFields.model_fields})
            filters, code = ship(config.filters, artifact)
            screening = compare_documents(slices, filters, code, source_stamp, config.resources, artifact)
            records = write_slices(slices, fields, tokenizer, source_stamp, config.resources, context, screening, code)
            if stamp(config.source) != source_stamp:
                raise UserError(
                    f"stages.{context.name}: the files it reads were changed or touched while they were read. Nothing "
                    "was recorded. Leave them alone while a run reads them, and run again."
                )
            check_slices(records, fields)
            streams = plan_validation(records, fields)
            validation = write_validation_streams(streams, fields, config.resources, artifact)
            summary = merge(artifact.local, records, validation, fields)
            for split in summary.index_sha256:
                artifact.publish(f"{split}/{INDEX_FILE}")
                artifact.publish(f"{split}/{TABLE_FILE}")
        output = _output(summary, len(slices), duplicates)
        _report(output, duplicates, context)
        return output


def planned_vocab_size(tokens: StageNode[TokenizeStage]) -> int:
    """Number of token ids before the stage has run; a tokenizer that will be trained or loaded may have others."""
    own, tokenizer = tokens.config.source.vocabulary, tokens.inputs.tokenizer
    if own is not None:
        return own.size
    assert tokenizer is not None, "check() refuses text without a tokenizer"
    return tokenizer.config.vocab_size


def _report(output: TokenizeOutput, duplicates: list[str], context: StageContext) -> None:
    """Tell MLflow what was left out, cut and padded; the user, too, if it is a noticeable share or breaks a task."""
    figures = {f"tokenize/left_out_{reason}": float(count) for reason, count in output.left_out.items()}
    figures["tokenize/duplicate_files"] = float(output.num_duplicate_files)
    for name in ("train_cut_documents", "train_padded_tokens", "valid_cut_documents", "valid_padded_tokens"):
        figures[f"tokenize/{name}"] = float(getattr(output, f"num_{name}"))
    context.journal.log_metrics(0, figures)
    num_left_out = sum(output.left_out.values())
    num_documents = num_left_out + output.num_train_documents + output.num_valid_documents
    if num_left_out > _NOTICEABLE_SHARE * num_documents:
        reasons = reasons_in_words(output.left_out)
        logger.warning("%d of %d documents were left out: %s.", num_left_out, num_documents, reasons)
    num_cut = output.num_train_cut_documents + output.num_valid_cut_documents
    if output.has_loss_mask and num_cut:
        logger.warning(
            "%d of %d documents do not fit into a sequence of %d tokens, so that answers may stand in another one than "
            "what they are read off. Set seq_len to the tokens of the longest document and one for its end, and "
            "packing to best_fit.",
            num_cut, num_documents, output.seq_len,
        )  # fmt: skip
    if duplicates:
        logger.warning(
            "%d names in the source lead to files that were already read, and are not read again: %s%s.",
            len(duplicates), ", ".join(duplicates[:3]), ", ..." if len(duplicates) > 3 else "",
        )  # fmt: skip


def _output(summary: ShardsSummary, num_slices: int, duplicates: list[str]) -> TokenizeOutput:
    counts: dict[str, Any] = {
        f"num_{split}_{name.removeprefix('num_')}": value
        for split in SPLITS
        for name, value in summary.counts[split].model_dump().items()
    }
    for split in SPLITS:
        counts[f"num_{split}_padded_tokens"] = summary.counts[split].num_padded_tokens(summary.format.seq_len)
    return TokenizeOutput(
        **summary.format.model_dump(),
        **counts,
        left_out=summary.left_out,
        num_duplicate_files=len(duplicates),
        num_slices=num_slices,
        train_sha256=summary.index_sha256["train"],
        valid_sha256=summary.index_sha256.get("valid"),
    )

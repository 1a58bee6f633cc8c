"""Tokenized data on the page of a report: its splits, its vocabulary, and what was left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.records import SPLITS
from pipelines.stages.sections import Section, Table
from pipelines.stages.tokenizer.stage import describe_source

if TYPE_CHECKING:
    from pipelines.engine.stage import StageNode
    from pipelines.stages.tokenize.stage import TokenizeOutput, TokenizeStage, TokenizeStageConfig

_FEW_DOCUMENTS = 100


def data_section(node: StageNode[TokenizeStage]) -> Section:
    """The share of a finished tokenize stage."""
    return Section(data=[_splits(node.name, node.config, node.output), _left_out(node.name, node.config, node.output)])


def _splits(name: str, config: TokenizeStageConfig, output: TokenizeOutput) -> Table:
    rows = []
    for split, label in zip(SPLITS, ("training", "validation"), strict=True):
        documents, tokens, num_bytes, samples, cut, padded = (
            getattr(output, f"num_{split}_{what}")
            for what in ("documents", "tokens", "bytes", "samples", "cut_documents", "padded_tokens")
        )
        rows.append(
            [
                label,
                f"{documents:,}",
                f"{tokens:,}",
                f"{num_bytes:,}" if num_bytes else "-",
                f"{num_bytes / tokens:.3f}" if num_bytes and tokens else "-",
                f"{samples:,}",
                f"{cut:,}",
                f"{padded / (samples * output.seq_len):.2%}" if samples else "-",
            ]
        )
    source = f"Source: {describe_source(config.source)}. Sequences of {output.seq_len:,} tokens."
    notes = [source, f"Vocabulary: {output.vocab_size:,} token ids."]
    if 0 < output.num_valid_documents < _FEW_DOCUMENTS:
        notes.append(
            f"Only {output.num_valid_documents} documents for validation: figures on them are uncertain, as their "
            "intervals say. Raise validation_fraction, or use more text."
        )
    columns = (
        "split", "documents", "tokens", "bytes of text", "bytes per token", "sequences", "cut documents", "padding"
    )  # fmt: skip
    return Table(title=name, columns=columns, rows=rows, notes=notes)


def _left_out(name: str, config: TokenizeStageConfig, output: TokenizeOutput) -> Table:
    kept = output.num_train_documents + output.num_valid_documents
    total = kept + sum(output.left_out.values())
    rows = [[reason, f"{count:,}", f"{count / total:.2%}"] for reason, count in output.left_out.items() if count]
    rows.append(["kept", f"{kept:,}", f"{kept / total:.2%}" if total else "-"])
    filters = ", ".join(filter_.kind for filter_ in config.filters) or "none"
    notes = [f"Filters: {filters}."]
    if output.num_duplicate_files:
        notes.append(f"Names that lead to files already read: {output.num_duplicate_files:,}.")
    columns = ("documents left out", "number", "share")
    return Table(title=f"{name}: what was left out", columns=columns, rows=rows, notes=notes)

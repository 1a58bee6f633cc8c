"""What the tokenize stage does, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from base.sealed import dumps, seal
from data import held_out
from data.config import TokenizeFields
from data.merging import check_slices, merge
from data.packing import plan_validation, write_slice, write_validation
from data.records import ShardsSummary, SliceRecord, SliceRecords, ValidationRecord, record_name
from data.sources import plan_slices, slice_bytes_of
from data.tokenizer import Tokenizer


class Tokenized(NamedTuple):
    """What the records say."""

    slices: list[SliceRecord]
    validation: list[ValidationRecord]
    summary: ShardsSummary


def tokenize_here(tokenizer: Tokenizer | None, fields: TokenizeFields, folder: Path) -> Tokenized:
    """Write the shards of a source and their indexes to the folder."""
    slices = plan_slices(fields.source, slice_bytes_of(fields))
    records = SliceRecords(write_slice(slice_, tokenizer, fields, folder) for slice_ in slices)
    check_slices(records, fields)
    validation = []
    for stream in plan_validation(records, fields):
        files = {number: folder / held_out.file_name(number) for number, _ in stream.slices}
        packed = write_validation(stream, files, fields, folder)
        validation.append(ValidationRecord(index=stream.number, slices_sha256=stream.sha256, valid=packed))
    for split, numbered in (("train", records), ("valid", validation)):
        for record in numbered:
            path = folder / record_name(split, record.index)
            path.parent.mkdir(exist_ok=True)
            path.write_text(dumps(seal(record.model_dump(mode="json"))))
    return Tokenized(list(records), validation, merge(folder, records, validation, fields))

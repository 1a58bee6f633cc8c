"""Ray tasks of the `tokenize` stage: slices, then validation streams. A record makes each count as done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from base.config import StrictConfig
from base.errors import DamagedError
from data.config import PackingFields
from data.filters.screening import NO_FILTERS, Screening
from data.records import RECORDS, SliceRecord, SliceRecords, ValidationRecord, record_name
from data.sources import Slice
from pipelines.engine.stage import Resources, StageContext
from pipelines.faults import explained_disk
from pipelines.stages.tasks import run_tasks
from pipelines.stages.tokenize.screening import NO_CODE, ShippedCode
from pipelines.stages.tokenize.stored_tokenizer import StoredTokenizer, load_tokenizer
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from data.packing import ValidationStream

_LOG_EVERY_S = 1.0
_READS_AT_ONCE = 16
_READS_HELD = 256

Record = TypeVar("Record", bound=StrictConfig)

logger = logging.getLogger(__name__)


def write_slices(
    slices: Sequence[Slice],
    fields: PackingFields,
    tokenizer: StoredTokenizer | None,
    source_stamp: str,
    resources: Resources,
    context: StageContext,
    screening: Screening = NO_FILTERS,
    code: ShippedCode = NO_CODE,
) -> SliceRecords:
    """Write the slices that are not yet written from these files by this tokenizer. Returns the records of all."""
    artifact, journal = context.artifact, context.journal
    records = finished_slices(artifact, source_stamp, tokenizer.sha256 if tokenizer else None)
    calls = [
        (slice_, fields, tokenizer, source_stamp, artifact, screening.of_slice(slice_.index), code)
        for slice_ in slices
        if slice_.index not in records
    ]
    num_tokens = num_bytes = 0
    for record in records:
        tokens_of_slice, bytes_of_slice = _size_of(record)
        num_tokens, num_bytes = num_tokens + tokens_of_slice, num_bytes + bytes_of_slice
    num_reused, tokens_reused = len(records), num_tokens
    journal.log_metrics(num_reused, {"tokenize/slices_total": len(slices), "tokenize/slices_done": num_reused})
    started = logged = time.monotonic()
    for record in run_tasks(_tokenize_slice, calls, resources):
        records.add(record)
        tokens_of_slice, bytes_of_slice = _size_of(record)
        num_tokens, num_bytes = num_tokens + tokens_of_slice, num_bytes + bytes_of_slice
        now = time.monotonic()
        if now - logged < _LOG_EVERY_S and len(records) < len(slices):
            continue
        logged = now
        journal.log_metrics(
            len(records),
            {
                "tokenize/slices_done": len(records),
                "tokenize/tokens": num_tokens,
                "tokenize/tokens_per_s": (num_tokens - tokens_reused) / (now - started),
                **({"tokenize/bytes_per_token": num_bytes / num_tokens} if num_bytes else {}),
            },
        )
    return records


def write_validation_streams(
    streams: Sequence[ValidationStream], fields: PackingFields, resources: Resources, artifact: ArtifactDir
) -> list[ValidationRecord]:
    """Pack the streams that are not yet packed from these slices. Returns the records of all."""
    wanted = {(stream.number, stream.sha256) for stream in streams}
    records = []
    for relpath, record in _records(artifact, RECORDS["valid"], ValidationRecord):
        if (record.index, record.slices_sha256) in wanted:
            records.append(record)
        else:
            artifact.delete(relpath)
    finished = {record.index for record in records}
    calls = [(stream, fields, artifact) for stream in streams if stream.number not in finished]
    return records + (list(run_tasks(_pack_validation, calls, resources)) if calls else [])


def _size_of(record: SliceRecord) -> tuple[int, int]:
    """Tokens and bytes of text."""
    train, held_out = record.train, record.held_out
    return (
        (train.counts.num_tokens if train else 0) + (held_out.num_tokens if held_out else 0),
        (train.counts.num_bytes if train else 0) + (held_out.num_bytes if held_out else 0),
    )


def _tokenize_slice(
    slice_: Slice,
    fields: PackingFields,
    tokenizer: StoredTokenizer | None,
    source_stamp: str,
    artifact: ArtifactDir,
    screening: Screening = NO_FILTERS,
    code: ShippedCode = NO_CODE,
) -> SliceRecord:
    """Runs as a Ray task. Raises DataError. The record is written last: with it the slice is done."""
    from data import held_out
    from data.index import folder_name
    from data.packing import write_slice

    with explained_disk(artifact.local), code.importable():
        loaded = load_tokenizer(tokenizer) if tokenizer else None
        record = write_slice(slice_, loaded, fields, artifact.local, screening)
    record = record.model_copy(update={"source_stamp": source_stamp})
    if record.train:
        artifact.publish(f"train/{folder_name(slice_.index)}")
    if record.held_out:
        artifact.publish(held_out.file_name(slice_.index))
    artifact.write_json(record_name("train", slice_.index), record.model_dump(mode="json"))
    return record


def _pack_validation(stream: ValidationStream, fields: PackingFields, artifact: ArtifactDir) -> ValidationRecord:
    """Runs as a Ray task. The record is written last: with it the stream is done."""
    from data.index import folder_name
    from data.packing import write_validation

    files = {number: _fetch_held_out(number, artifact) for number, _ in stream.slices}
    with explained_disk(artifact.local):
        packed = write_validation(stream, files, fields, artifact.local)
    artifact.publish(f"valid/{folder_name(stream.number)}")
    record = ValidationRecord(index=stream.number, slices_sha256=stream.sha256, valid=packed)
    artifact.write_json(record_name("valid", stream.number), record.model_dump(mode="json"))
    return record


def _fetch_held_out(slice_index: int, artifact: ArtifactDir) -> Path:
    from data import held_out

    try:
        return artifact.fetch(held_out.file_name(slice_index))
    except FileNotFoundError as error:
        record = f"{artifact.url}/{record_name('train', slice_index)}"
        raise DamagedError(f"{error} Delete {record} to have it written again.") from error


def finished_slices(artifact: ArtifactDir, source_stamp: str, tokenizer_sha256: str | None) -> SliceRecords:
    """The records of slices written from these files by this tokenizer; those of others are removed.

    Raises: DamagedError: a record is not as it was written.
    """
    finished = SliceRecords()
    for relpath, record in _records(artifact, RECORDS["train"], SliceRecord):
        if record.source_stamp == source_stamp and record.format.tokenizer_sha256 == tokenizer_sha256:
            finished.add(record)
        else:
            artifact.delete(relpath)
    return finished


def _records(artifact: ArtifactDir, folder: str, kind: type[Record]) -> Iterator[tuple[str, Record]]:
    """Paths and contents of all records in a folder, read several at once: each may be a request to a store."""

    def read(relpath: str) -> Record:
        fields = artifact.read_json(relpath)
        try:
            return kind.model_validate(fields)
        except ValidationError as error:
            raise DamagedError(
                f"{artifact.url}/{relpath}: of another version of this program. Delete it to have what it describes "
                "written again."
            ) from error

    relpaths = [f"{folder}/{name}" for name in artifact.listdir(folder)]
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for first in range(0, len(relpaths), _READS_HELD):
            some = relpaths[first : first + _READS_HELD]
            yield from zip(some, pool.map(read, some), strict=True)

"""What the driver of `tokenize` costs per slice: `python -m benchmarks.tokenize_driver`.

Slices of as many small files as slices, whose names are given one by one; records that are made up instead of written
by tasks. CPU microseconds per slice of each step, bytes of a pickled slice, and the memory that all steps add.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import pickle
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from base.sealed import dumps, seal
from data.config import FilesSource, PackingFields
from data.merging import check_slices, merge
from data.packing import plan_validation
from data.records import (
    NOTHING,
    HeldOut,
    Packed,
    PackingFormat,
    ShardEntry,
    SliceRecord,
    ValidationRecord,
    record_name,
)
from data.sources import Slice, plan_slices, stamp
from pipelines.engine.stage import Resources, StageContext
from pipelines.stages.tokenize import writing
from pipelines.stages.tokenize.stored_tokenizer import StoredTokenizer
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal

FORMAT = PackingFormat(
    seq_len=1024, eod_id=0, vocab_size=8192, token_dtype="uint16", tokenizer_sha256="a" * 64, has_loss_mask=False
)
FIELDS = PackingFields(seq_len=FORMAT.seq_len)
FILE_BYTES = 1024

Result = TypeVar("Result")


def made_up_record(index: int, source_stamp: str) -> SliceRecord:
    """A record as of a slice of 8 MiB."""
    digest = hashlib.sha256(str(index).encode()).hexdigest()
    counts = NOTHING.model_copy(update={"num_documents": 10_000, "num_samples": 2000, "num_tokens": 2_048_000})
    return SliceRecord(
        index=index,
        format=FORMAT,
        left_out={},
        positions=(0.001, 0.999),
        train=Packed(
            counts=counts, shards=(ShardEntry("shard.00000.mds", 2000, 4 << 20, digest),), documents_sha256=digest
        ),
        held_out=HeldOut(100, 20_480, 81_920, 40_000, digest),
        source_stamp=source_stamp,
    )


def measure(num_slices: int, folder: Path) -> None:
    """Print one line."""
    paths = [folder / "text" / f"{i // 1000}" / f"{i}.txt" for i in range(num_slices)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * FILE_BYTES)
    source = FilesSource(kind="files", paths=tuple(map(str, paths)))
    del paths
    before_mb, cost_us = peak_mb(), {}

    def timed(step: str, function: Callable[[], Result]) -> Result:
        started = time.process_time()
        result = function()
        cost_us[step] = (time.process_time() - started) / num_slices * 1e6
        return result

    source_stamp = timed("stamp", lambda: stamp(source))
    slices = timed("plan", lambda: plan_slices(source, FILE_BYTES))
    assert len(slices) == num_slices
    made_up_us = cpu_us(lambda: made_up_record(0, source_stamp), 1000)

    def made_up(function: object, calls: Sequence[tuple[Any, ...]], resources: Resources) -> Iterator[SliceRecord]:
        return (made_up_record(slice_.index, source_stamp) for slice_, *_ in calls)

    artifact = ArtifactDir.at(folder / "artifact")
    with Journal(folder / "journal.jsonl") as journal, mock.patch.object(writing, "run_tasks", made_up):
        context = StageContext(name="tokens", fingerprint="f" * 64, artifact=artifact, journal=journal)

        def write(slices: Sequence[Slice]) -> Any:
            tokenizer = StoredTokenizer(artifact, FORMAT.tokenizer_sha256 or "")
            return writing.write_slices(slices, FIELDS, tokenizer, source_stamp, Resources(), context)

        timed("collect", lambda: write(slices))
        cost_us["collect"] -= made_up_us
        for slice_ in slices:
            path = artifact.local / record_name("train", slice_.index)
            path.parent.mkdir(exist_ok=True)
            path.write_text(dumps(seal(made_up_record(slice_.index, source_stamp).model_dump(mode="json"))))
        records = timed("read again", lambda: write(slices))
    timed("check", lambda: check_slices(records, FIELDS))
    streams = timed("plan validation", lambda: plan_validation(records, FIELDS))
    packed = made_up_record(0, "").train
    assert packed
    validation = [ValidationRecord(index=s.number, slices_sha256=s.sha256, valid=packed) for s in streams]
    timed("merge", lambda: merge(artifact.local, records, validation, FIELDS))
    steps = ", ".join(f"{step} {cost:.0f}" for step, cost in cost_us.items())
    print(
        f"{num_slices:7,} slices: {sum(cost_us.values()):5.0f} us of CPU each ({steps}); "
        f"{len(pickle.dumps(slices[0]))} bytes pickled; {peak_mb() - before_mb:.0f} MB more",
        flush=True,
    )


def cpu_us(function: Callable[[], object], repeats: int) -> float:
    """CPU microseconds of a call."""
    started = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - started) / repeats * 1e6


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a line per number of slices, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--folder", default=None, help="where to put the files; default: a temporary folder")
    arguments = parser.parse_args()
    for num_slices in arguments.slices:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(num_slices, Path(folder)))
            process.start()
            process.join()
            assert process.exitcode == 0


if __name__ == "__main__":
    main()

"""An append-only file of what a stage has to show, written at once and locally.

One JSON object per line, whose last member is the CRC-32 of the line before it. A line is written by one write call,
so a killed process leaves at most a torn last line, which the next writer cuts off. A write that the disk cut short is
undone at once, and raises. What is in the journal reaches every sink sooner or later (replay.py), whatever dies in
between.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.sealed import dumps
from pipelines.faults import explained_disk
from pipelines.redact import redact

_READ_BYTES = 1 << 20
_CHECKSUM = b', "crc": "%08x"}'
_CHECKSUM_BYTES = len(_CHECKSUM % 0)
NOTICE = "bmojo.notice"  # the tag of log_notice
DAMAGED = "damaged"  # the event that read_events makes of a line that is not as it was written; it has a `problem`

log = logging.getLogger(__name__)


def journal_name(stage: str, number: int) -> str:
    """The journal file that the owner number `number` of a run (pipelines.engine.lease) writes for a stage.

    Every owner has files of its own. So one that was stopped and lost its lease neither blocks its successor nor writes
    into the successor's files.
    """
    return f"{stage}.{number:06d}.jsonl"


def journals_of(directory: Path, stage: str, suffix: str = ".jsonl") -> list[Path]:
    """A stage's journals of all owners so far, the oldest first."""
    return [path for _, path in sorted((_owner(path), path) for path in directory.glob(f"{stage}.*{suffix}")
                                       if _key(path) == (stage, suffix))]  # fmt: skip


class Journal:
    """Writes one journal file. One writer at a time, in one process; its threads may share it.

    Raises: UserError: another process still has the file open for writing after `lock_timeout_s`.
    """

    def __init__(self, path: str | os.PathLike[str], lock_timeout_s: float = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._steps: dict[str, StepSet] = {}
        self._tags: dict[str, str] = {}
        self._notices: set[str] = set()
        self._end = 0  # behind the last whole line; more in the file than this is a write that failed
        self._is_torn = False
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._take(time.monotonic() + lock_timeout_s)
            self._recover()
        except BaseException:
            os.close(self._descriptor)
            raise

    def log_metrics(self, step: int, values: Mapping[str, float], time_ms: int | None = None) -> None:
        """Record metric values at a step, at wall-clock `time_ms` since the epoch (default: now).

        A point that the journal, or that of an earlier owner, already has is left out: a stage that resumes from a
        checkpoint does the steps since then again, with the same result, and they are already told.

        Raises: InfrastructureError, UserError: the disk did not take the point; the journal is as it was before.
        """
        with self._lock:
            fresh = {name: float(value) for name, value in values.items() if not self._is_told(name, step)}
            if fresh:
                self._append({"event": "metrics", "step": step, "values": fresh}, time_ms)
                self._note_told(fresh, step)

    def last_step(self, name: str) -> int | None:
        """The last step journalled for a metric, by this writer or one before it."""
        with self._lock:
            return self._steps[name].last if name in self._steps else None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters by their dotted names; secrets among them are masked."""
        self.write("params", params=redact(dict(params)))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Record texts by name, of which the latest counts; secrets among them are masked.

        What the journal, or that of an earlier owner, already says is left out.
        """
        with self._lock:
            fresh = {name: text for name, text in redact(dict(tags)).items() if self._tags.get(name) != text}
            if fresh:
                self._append({"event": "tags", "tags": fresh})
                self._tags |= fresh

    def log_notice(self, text: str) -> None:
        """Record something worth a line to whoever watches the run; the latest is a tag, too.

        What the journal, or that of an earlier owner, has said before is left out.
        """
        text = redact({NOTICE: text})[NOTICE]
        with self._lock:
            if text not in self._notices:
                self._append({"event": "tags", "tags": {NOTICE: text}})
                self._notices.add(text)

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Record that a data set was read: `digest` identifies its content, `source` says where it is."""
        self.write("dataset", name=name, digest=digest, source=redact(source), context=context)

    def log_artifact(self, relpath: str) -> None:
        """Record that a file or directory of the stage's artifact, by its path in it, is to be shown with the run."""
        self.write("artifact", path=relpath)

    def log_json(self, file: str, content: Any) -> None:
        """Record a JSON or YAML document (by the suffix of `file`) to be shown with the run."""
        self.write("json", file=file, content=redact(content))

    def log_table(self, file: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table to be shown with the run. Args: file: ends with .json. rows: of texts, numbers and None."""
        self.write("table", file=file, columns=list(columns), rows=redact([list(row) for row in rows]))

    def log_model(self, name: str, relpath: str, tags: Mapping[str, Any] | None = None) -> None:
        """Record that a directory of the stage's artifact is a model to be registered under `name`."""
        self.write("model", name=name, path=relpath, tags={key: str(value) for key, value in (tags or {}).items()})

    def write(self, event: str, **fields: Any) -> None:
        """Append one event of any type that replay.py knows."""
        with self._lock:
            self._append({"event": event, **fields})

    def flush(self) -> None:
        """Return once everything written is on the disk, safe from a power cut. Raises as log_metrics."""
        with self._lock, explained_disk(self.path):
            if self._descriptor >= 0:
                self._cut_torn()
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and let another process write. Closing twice does no harm."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                try:
                    with explained_disk(self.path):
                        os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, event: dict[str, Any], time_ms: int | None = None) -> None:
        if self._descriptor < 0:
            raise ValueError(f"{self.path} is closed.")
        line = encode_line({"t": int(time.time() * 1000) if time_ms is None else time_ms, **event})
        with explained_disk(self.path):
            self._cut_torn()
            self._is_torn = True
            try:
                data = memoryview(line)
                while data:  # a short write is followed by the error that explains it
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                self._cut_torn()
                raise
            self._end += len(line)
            self._is_torn = False

    def _cut_torn(self) -> None:
        """Take back a write that failed; if even that fails, the next write tries again."""
        if self._is_torn:
            os.ftruncate(self._descriptor, self._end)
            self._is_torn = False

    def _is_told(self, name: str, step: int) -> bool:
        return name in self._steps and step in self._steps[name]

    def _note_told(self, names: Iterable[str], step: int) -> None:
        for name in names:
            self._steps.setdefault(name, StepSet()).add(step)

    def _take(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"{self.path} is being written by another process. Wait for that run to end, or stop it; then "
                        "run again."
                    ) from error
                time.sleep(0.2)
            else:
                return

    def _recover(self) -> None:
        """Cut off a torn last line and read which points and tags are told, by this owner or one before it."""
        stage, suffix = _key(self.path)
        for path in journals_of(self.path.parent, stage, suffix):
            if _owner(path) < _owner(self.path):
                self._read_told(path)
        self._end = self._read_told(self.path)
        os.ftruncate(self._descriptor, self._end)
        if self._end and os.pread(self._descriptor, 1, self._end - 1) != b"\n":  # the last line's end is damaged
            os.ftruncate(self._descriptor, self._end - 1)
            os.write(self._descriptor, b"\n")

    def _read_told(self, path: Path) -> int:
        end = 0
        for event, end in read_events(path):  # noqa: B007 (the last value is returned)
            if event["event"] == "metrics":
                self._note_told(event["values"], event["step"])
            elif event["event"] == "tags":
                self._tags |= event["tags"]
                if NOTICE in event["tags"]:
                    self._notices.add(event["tags"][NOTICE])
            elif event["event"] == DAMAGED:
                log.warning("%s", event["problem"])
        return end


def workers_journal(journal: Path) -> Path:
    """The file that the workers of the stage of `journal` write (pipelines.tracking.remote)."""
    return journal.with_name(f"{journal.stem}.workers.jsonl")


class StepSet:
    """Steps of a metric, one bit each: a long run has millions."""

    _BITS = 4096

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self.last: int | None = None

    def add(self, step: int) -> None:
        block, bit = divmod(step, self._BITS)
        self._blocks[block] = self._blocks.get(block, 0) | 1 << bit
        self.last = step if self.last is None else max(self.last, step)

    def __contains__(self, step: int) -> bool:
        block, bit = divmod(step, self._BITS)
        return bool(self._blocks.get(block, 0) >> bit & 1)


def encode_line(event: Mapping[str, Any]) -> bytes:
    """An event as a line of a journal, with its checksum and line end."""
    body = dumps(event).encode()
    return body[:-1] + _CHECKSUM % zlib.crc32(body) + b"\n"


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete events from byte `offset` on, each with the offset just behind it. A torn last line is not read.

    A complete line that is not as it was written comes as an event of the type DAMAGED.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below; a missing file is not an error)
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        rest = b""
        while block := file.read(_READ_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield _decode(line, path, offset), offset
        if _checked_body(rest[:-1]) is not None:  # a whole line whose end is damaged, and nothing else of it
            yield _decode(rest[:-1], path, offset + len(rest)), offset + len(rest)


def _key(path: Path) -> tuple[str, str]:
    """The stage and what follows the owner's number in a journal's name."""
    stage, *rest = path.name.split(".")
    return stage, "." + ".".join(rest[1:] if rest and rest[0].isdigit() else rest)


def _owner(path: Path) -> int:
    number = path.name.split(".")[1]
    return int(number) if number.isdigit() else 0


def _decode(line: bytes, path: Path, end: int) -> dict[str, Any]:
    body = _checked_body(line)
    if body is None:
        known = b', "crc": "' in line
        reason = "does not match its checksum" if known else "has no checksum; an earlier version may have written it"
        problem = f"{path} is damaged just before byte {end}: the line {reason}. It is left out."
        return {"event": DAMAGED, "t": 0, "problem": problem}
    event: dict[str, Any] = json.loads(body)
    if event["event"] == "metrics":
        event["values"] = {name: float(value) for name, value in event["values"].items()}
    return event


def _checked_body(line: bytes) -> bytes | None:
    """The line without its checksum, or None if the two do not match."""
    body, checksum = line[:-_CHECKSUM_BYTES] + b"}", line[-_CHECKSUM_BYTES:]
    return body if checksum == _CHECKSUM % zlib.crc32(body) else None

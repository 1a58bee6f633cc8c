"""Replays a run's journals to its sinks in the background: nothing is lost, nothing arrives twice, nobody waits.

Each sink has a replay of its own: how far each journal has been delivered there is kept in a cursor file, written after
the delivery. A crash between the two repeats the last delivery, which changes nothing (sink.py).
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

from pydantic import Field, ValidationError

from base.config import StrictConfig
from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.redact import redact
from pipelines.storage import LocalStorage
from pipelines.tracking.journal import DAMAGED, read_events
from pipelines.tracking.sink import Event, Sink, Target, UnsendableError
from pipelines.tracking.trouble import Cause, Trouble, brief

RUN_JOURNAL = "+run"  # a name that no stage can have
_EVENTS_AT_ONCE = 2000
_POLL_S = 0.5
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
_BACK = "back"
_PATIENCE_S = 5.0  # at the end of a run, with a sink that does not answer

log = logging.getLogger(__name__)


class _Position(StrictConfig):
    """How far one journal has been delivered."""

    offset: int = 0
    artifact_url: str | None = None


class _Cursor(StrictConfig):
    """How far a run has been delivered to one target."""

    runs: dict[str, str] = Field(default_factory=dict)  # stage or RUN_JOURNAL -> the sink's id of the run
    journals: dict[str, _Position] = Field(default_factory=dict)


class Replay:
    """Delivers the journals of one run to one target, in the calling thread."""

    def __init__(self, journal_dir: Path, target: Target, run_id: str) -> None:
        self.target = target
        self._dir, self._run_id = journal_dir, run_id
        self._cursor_file = f"delivered-{target.key}.json"
        self._store = LocalStorage(journal_dir.parent)
        self._cursor = self._load_cursor()
        self._sink: Sink | None = None
        self.refused: list[str] = []  # events that the sink does not take, and why
        self.delivered = 0  # events, by this object
        self.cursor_trouble: Trouble | None = None  # why the last attempt to save the cursor failed

    @property
    def runs(self) -> dict[str, str]:
        """The sink's run ids by stage, that of the pipeline run under "+run", as far as delivered."""
        return dict(self._cursor.runs)

    def pending(self) -> int:
        """How many events are not delivered yet."""
        return sum(_num_lines(path, self._position(path).offset) for path in self._journals())

    def deliver(self) -> bool:
        """Deliver what there is, for at most some seconds' worth of each journal. Returns whether there was anything.

        Raises: whatever the sink raises (Target.diagnose explains it); what was delivered until then is remembered.
        """
        anything = False
        for path in self._journals():
            if path.stat().st_size > self._position(path).offset:
                with self._turn():
                    anything |= self._deliver_journal(path)
        return anything

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One deliverer at a time: a live run's and `bmojo sync` would both make the run that they do not find."""
        with ExitStack() as stack:
            with suppress(OSError):  # if nothing can be written, no other deliverer is running
                lock = stack.enter_context(open(self._dir.parent / f"delivered-{self.target.key}.lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _deliver_journal(self, path: Path) -> bool:
        position = self._position(path)
        try:
            chunk = list(islice(read_events(path, position.offset), _EVENTS_AT_ONCE))
        except OSError as error:
            raise InfrastructureError(
                f"{path} cannot be read ({brief(error)}); its points are not delivered."
            ) from error
        if not chunk:
            return False
        stage = path.name.split(".")[0]
        sink, run = self._open(stage, next((event["t"] for event, _ in chunk if event["t"]), 0))
        metrics: list[Event] = []
        done = 0
        for number, (event, end) in enumerate(chunk, start=1):
            if event["event"] == "metrics":
                metrics.append(event)
                continue
            self._send(sink, run, metrics, position.artifact_url)
            metrics = []
            if event["event"] == "start":
                position = position.model_copy(update={"artifact_url": event["artifact_url"]})
            if event["event"] == DAMAGED:
                self._refuse(f"{DAMAGED}: {event['problem']}")
            else:
                self._send(sink, run, [event], position.artifact_url)
            if event["event"] in ("artifact", "model", "json", "table"):  # costly to repeat
                self._advance(path, position, end, number - done)
                done = number
        self._send(sink, run, metrics, position.artifact_url)
        self._advance(path, position, chunk[-1][1], len(chunk) - done)
        return True

    def _open(self, stage: str, time_ms: int) -> tuple[Sink, str]:
        if self._sink is None:
            sink = self.target.open(self._run_id)
            if not all(sink.has_run(run) for run in self._cursor.runs.values()):
                self._start_again()
            self._sink = sink
        if stage not in self._cursor.runs:
            self._cursor.runs[stage] = self._sink.open_run(None if stage == RUN_JOURNAL else stage, time_ms)
        return self._sink, self._cursor.runs[stage]

    def _start_again(self) -> NoReturn:
        """Deliver all of it again: the run was deleted in the sink, or the sink is another one."""
        self._cursor, self._sink = _Cursor(), None
        self._save_cursor()
        raise _StartAgain

    def _send(self, sink: Sink, run: str, events: Sequence[Event], artifact_url: str | None) -> None:
        if not events:
            return
        try:
            sink.send(run, events, artifact_url)
        except UnsendableError as error:
            if not sink.has_run(run):  # it is not the event that is refused: the run was deleted meanwhile
                self._start_again()
            if len(events) == 1:
                cause = error.__cause__ or error
                self._refuse(f"{events[0]['event']}: {type(cause).__name__}: {cause}")
                return
            middle = len(events) // 2
            self._send(sink, run, events[:middle], artifact_url)
            self._send(sink, run, events[middle:], artifact_url)

    def _refuse(self, problem: str) -> None:
        text = str(redact(problem))
        log.warning("%s does not accept a journal event, it is left out: %s", self.target.name, text)
        self.refused.append(text)

    def _advance(self, path: Path, position: _Position, offset: int, num_events: int) -> None:
        self.delivered += num_events
        self._cursor.journals[path.name] = position.model_copy(update={"offset": offset})
        self._save_cursor()

    def _position(self, path: Path) -> _Position:
        return self._cursor.journals.get(path.name, _Position())

    def _journals(self) -> list[Path]:
        return sorted(self._dir.glob("*.jsonl"))  # "+run" sorts before every stage

    def _load_cursor(self) -> _Cursor:
        try:
            return _Cursor.model_validate(self._store.read_json(self._cursor_file))
        except (OSError, UserError, InfrastructureError, ValidationError):
            return _Cursor()  # delivering again from the start changes nothing

    def _save_cursor(self) -> None:
        """Note how far we are. If that fails, some of it is delivered once more later, which changes nothing."""
        try:
            self._store.write_json_atomic(self._cursor_file, self._cursor.model_dump(mode="json"))
            self.cursor_trouble = None
        except (OSError, InfrastructureError, UserError) as error:
            self.cursor_trouble = Trouble(
                Cause.DISK, f"{self._dir.parent / self._cursor_file} cannot be written ({brief(error)})."
            )


class Replayer:
    """Runs a Replay in a background thread and keeps trying while the sink is away or refuses.

    Each cause is reported once, with its remedy, and its end when all that was held up is delivered.
    """

    def __init__(self, replay: Replay, notify: Callable[[str], None]) -> None:
        self._replay, self._notify = replay, notify
        self._draining = threading.Event()
        self._ending_since = 0.0
        self._drained = threading.Event()
        self._reported: set[str] = set()
        self._trouble: Trouble | None = None
        self._thread = threading.Thread(target=self._run, name=f"replay to {replay.target.name}", daemon=True)

    @property
    def trouble(self) -> Trouble | None:
        """Why points wait; None while they get through."""
        return self._trouble

    def start(self) -> None:
        """Begin delivering."""
        self._thread.start()

    def end_when_drained(self) -> None:
        """End the thread once what is left is delivered."""
        self._ending_since = self._ending_since or time.monotonic()
        self._draining.set()

    def drain(self, deadline_s: float) -> Backlog | None:
        """Wait until what is left is delivered, at most so long after end_when_drained().

        Returns: what remains for the next time, if anything does. A sink that does not take it is given a few seconds.
        """
        self.end_when_drained()
        while not self._drained.wait(0.1):
            waited_s = time.monotonic() - self._ending_since
            if waited_s >= deadline_s or (self._trouble is not None and waited_s >= _PATIENCE_S):
                break
        remaining = self._replay.pending()
        return Backlog(self._replay.target.name, remaining, self._trouble) if remaining else None

    def _run(self) -> None:
        retry_s = 0.0
        while True:
            try:
                if not self._replay.deliver():
                    retry_s = 0.0  # only now: a sink that is half there takes something each time
                    self._note_end_of_trouble()
                    if self._draining.is_set():
                        break
                    self._draining.wait(_POLL_S)
                if self._replay.cursor_trouble is not None:
                    self._report(self._replay.cursor_trouble)
            except _StartAgain:
                continue
            except Exception as error:
                self._trouble = self._replay.target.diagnose(error)
                self._report(self._trouble)
                retry_s = min(_LAST_RETRY_S, 2 * retry_s or _FIRST_RETRY_S)
                if self._draining.is_set():
                    time.sleep(min(retry_s, _FIRST_RETRY_S))
                else:
                    self._draining.wait(retry_s)
        self._drained.set()

    def _report(self, trouble: Trouble) -> None:
        if trouble.cause not in self._reported:
            self._reported.add(trouble.cause)
            self._notify(f"{trouble.text} The run goes on; its points are kept and delivered later.")

    def _note_end_of_trouble(self) -> None:
        """All there was is delivered. Of a sink that comes and goes, only the first return is reported."""
        if self._trouble is not None and _BACK not in self._reported:
            self._notify(f"{self._replay.target.where} answers again; all points so far are delivered.")
            self._reported.add(_BACK)
        self._trouble = None


class _StartAgain(Exception):  # noqa: N818 (it is no error)
    """The cursor was reset."""


@dataclass(frozen=True)
class Backlog:
    """What a sink has not got yet. The next run or `bmojo sync` delivers it."""

    sink: str  # name of the target
    events: int
    trouble: Trouble | None  # why; None: it is slow


@dataclass(frozen=True)
class Delivery:
    """What a delivery did. Counts are of events: points, parameters, files."""

    delivered: int
    remaining: int
    refused: tuple[str, ...]  # events left out because the sink will never take them, and why
    trouble: Trouble | None  # why the rest remains


def deliver_all(replay: Replay, on_progress: Callable[[int, int], None] = lambda delivered, total: None) -> Delivery:
    """Deliver everything there is, in the calling thread, or as far as it goes.

    Args: on_progress: called now and then with the events delivered and their total.
    """
    trouble = None
    try:
        while replay.pending():
            on_progress(replay.delivered, replay.delivered + replay.pending())
            try:
                if not replay.deliver():
                    break  # what is left is a line that is being written
            except _StartAgain:
                continue
    except Exception as error:
        trouble = replay.target.diagnose(error)
    return Delivery(replay.delivered, replay.pending(), tuple(replay.refused), trouble or replay.cursor_trouble)


def _num_lines(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

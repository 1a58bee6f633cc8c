"""Replays a run's journals to MLflow in the background: nothing is lost, nothing is told twice, nobody waits.

How far each journal has been delivered is kept in a cursor file, written after the delivery. A crash between the two
repeats the last delivery, which changes nothing (mlflow_sink.py).
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

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import InfrastructureError, UserError
from pipelines.redact import redact
from pipelines.storage import LocalStorage
from pipelines.tracking.journal import DAMAGED, read_events
from pipelines.tracking.mlflow_sink import Event, MlflowSink, UnsendableError
from pipelines.tracking.target import TrackingTarget
from pipelines.tracking.trouble import Cause, DiskError, Trouble, brief, diagnose

RUN_JOURNAL = "+run"  # a name that no stage can have
_EVENTS_AT_ONCE = 2000
_POLL_S = 0.5
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
_BACK = "back"
_PATIENCE_S = 5.0  # at the end of a run, with a server that does not answer
_UNACCEPTABLE = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE"}

log = logging.getLogger(__name__)


class _Position(BaseModel):
    """How far one journal has been delivered."""

    model_config = ConfigDict(extra="forbid")

    offset: int = 0
    artifact_url: str | None = None


class _Cursor(BaseModel):
    """How far a run has been delivered to one target."""

    model_config = ConfigDict(extra="forbid")

    mlflow_runs: dict[str, str] = {}  # stage or RUN_JOURNAL -> MLflow's run id
    journals: dict[str, _Position] = {}


class Replay:
    """Delivers the journals of one run to one target, in the calling thread."""

    def __init__(self, journal_dir: Path, target: TrackingTarget, run_id: str) -> None:
        self._dir, self._target, self._run_id = journal_dir, target, run_id
        self._cursor_file = f"delivered-{target.key}.json"
        self._store = LocalStorage(journal_dir.parent)
        self._cursor = self._load_cursor()
        self._sink: MlflowSink | None = None
        self.refused: list[str] = []  # events that the server does not accept, and why
        self.delivered = 0  # events, by this object
        self.cursor_trouble: Trouble | None = None  # why the last attempt to save the cursor failed

    @property
    def mlflow_runs(self) -> dict[str, str]:
        """MLflow's run ids by stage, that of the pipeline run under "+run", as far as delivered."""
        return dict(self._cursor.mlflow_runs)

    def diagnose(self, error: Exception) -> Trouble:
        """What an error of deliver() means."""
        return diagnose(error, self._target)

    def pending(self) -> int:
        """How many events are not delivered yet."""
        return sum(_num_lines(path, self._position(path).offset) for path in self._journals())

    def deliver(self) -> bool:
        """Deliver what there is, for at most some seconds' worth of each journal. Returns whether there was anything.

        Raises: whatever MLflow or the network raises; what was delivered until then is remembered.
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
            with suppress(OSError):  # where nothing can be written, no other deliverer is at work
                lock = stack.enter_context(open(self._dir.parent / f"delivered-{self._target.key}.lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _deliver_journal(self, path: Path) -> bool:
        position = self._position(path)
        try:
            chunk = list(islice(read_events(path, position.offset), _EVENTS_AT_ONCE))
        except OSError as error:
            raise DiskError(f"{path} cannot be read ({brief(error)}); its points are not delivered.") from error
        if not chunk:
            return False
        stage = path.name.split(".")[0]
        mlflow_run = self._mlflow_run(stage, next((event["t"] for event, _ in chunk if event["t"]), 0))
        metrics: list[Event] = []
        done = 0
        for number, (event, end) in enumerate(chunk, start=1):
            if event["event"] == "metrics":
                metrics.append(event)
            else:
                self._send_metrics(mlflow_run, metrics)
                metrics = []
                if event["event"] == "start":
                    position.artifact_url = event["artifact_url"]
                self._send(mlflow_run, event, position.artifact_url)
                if event["event"] in ("artifact", "model", "json"):  # costly to repeat
                    self._advance(path, position, end, number - done)
                    done = number
        self._send_metrics(mlflow_run, metrics)
        self._advance(path, position, chunk[-1][1], len(chunk) - done)
        return True

    def _mlflow_run(self, stage: str, time_ms: int) -> str:
        if self._sink is None:
            sink = MlflowSink(self._target, self._run_id)
            known = self._cursor.mlflow_runs.values()
            sink.connect()
            if not all(sink.is_there(mlflow_run) for mlflow_run in known):
                self._start_again()
            self._sink = sink
        if stage not in self._cursor.mlflow_runs:
            self._cursor.mlflow_runs[stage] = self._sink.open_run(None if stage == RUN_JOURNAL else stage, time_ms)
        return self._cursor.mlflow_runs[stage]

    def _start_again(self) -> NoReturn:
        """Tell all of it again: the run was deleted in the store, or the store is another one."""
        self._cursor, self._sink = _Cursor(), None
        self._save_cursor()
        raise _StartAgain

    def _send_metrics(self, mlflow_run: str, events: Sequence[Event]) -> None:
        assert self._sink is not None
        if not events:
            return
        try:
            self._sink.log_metrics(mlflow_run, events)
        except Exception as error:
            if not _is_unacceptable(error):
                raise
            self._require_run(mlflow_run)
            if len(events) == 1:
                self._refuse(events[0], error)
                return
            middle = len(events) // 2
            self._send_metrics(mlflow_run, events[:middle])
            self._send_metrics(mlflow_run, events[middle:])

    def _send(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        assert self._sink is not None
        try:
            if event["event"] == DAMAGED:
                raise UnsendableError(event["problem"])
            self._sink.apply(mlflow_run, event, artifact_url)
        except Exception as error:
            if not _is_unacceptable(error):
                raise
            self._require_run(mlflow_run)
            self._refuse(event, error)

    def _require_run(self, mlflow_run: str) -> None:
        """See that it is the event that the store refuses, not a run that was deleted meanwhile."""
        assert self._sink is not None
        if not self._sink.is_there(mlflow_run):
            self._start_again()

    def _refuse(self, event: Event, error: Exception) -> None:
        text = str(redact(f"{event['event']}: {type(error).__name__}: {error}"))
        log.warning("MLflow does not accept a journal event, it is left out: %s", text)
        self.refused.append(text)

    def _advance(self, path: Path, position: _Position, offset: int, num_events: int) -> None:
        self.delivered += num_events
        position.offset = offset
        self._cursor.journals[path.name] = position
        self._save_cursor()

    def _position(self, path: Path) -> _Position:
        return self._cursor.journals.get(path.name, _Position()).model_copy()

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
    """Runs a Replay in a background thread and keeps on trying while the server is away or refuses.

    Each cause is told once, with its remedy, and its end when all that was held up is delivered.
    """

    def __init__(self, replay: Replay, notify: Callable[[str], None], shown_uri: str) -> None:
        self._replay, self._notify, self._shown_uri = replay, notify, shown_uri
        self._draining = threading.Event()
        self._drained = threading.Event()
        self._told: set[str] = set()
        self._trouble: Trouble | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow replayer", daemon=True)

    @property
    def trouble(self) -> Trouble | None:
        """Why points wait; None while they get through."""
        return self._trouble

    def start(self) -> None:
        """Begin delivering."""
        self._thread.start()

    def drain(self, deadline_s: float) -> int:
        """Deliver what is left. Returns how many events remain for the next time.

        Waits at most `deadline_s` seconds, and only a few where the server does not take them.
        """
        long_s = deadline_s
        self._draining.set()
        while not self._drained.wait(0.1):
            deadline_s -= 0.1
            if deadline_s <= 0 or (self._trouble is not None and deadline_s <= long_s - _PATIENCE_S):
                break
        return self._replay.pending()

    def _run(self) -> None:
        retry_s = 0.0
        while True:
            try:
                if not self._replay.deliver():
                    retry_s = 0.0  # only now: a server that is half there takes something each time
                    self._note_end_of_trouble()
                    if self._draining.is_set():
                        break
                    self._draining.wait(_POLL_S)
                if self._replay.cursor_trouble is not None:
                    self._tell(self._replay.cursor_trouble)
            except _StartAgain:
                continue
            except Exception as error:
                self._trouble = self._replay.diagnose(error)
                self._tell(self._trouble)
                retry_s = min(_LAST_RETRY_S, 2 * retry_s or _FIRST_RETRY_S)
                if self._draining.is_set():
                    time.sleep(min(retry_s, _FIRST_RETRY_S))
                else:
                    self._draining.wait(retry_s)
        self._drained.set()

    def _tell(self, trouble: Trouble) -> None:
        if trouble.cause not in self._told:
            self._told.add(trouble.cause)
            self._notify(f"{trouble.text} The run goes on; its points are kept and delivered later.")

    def _note_end_of_trouble(self) -> None:
        """All there was is delivered. Of a server that comes and goes, only the first time is told."""
        if self._trouble is not None and _BACK not in self._told:
            self._notify(f"MLflow at {self._shown_uri} answers again; all points so far are delivered.")
            self._told = self._told | {_BACK}
        self._trouble = None


class _StartAgain(Exception):  # noqa: N818 (it is no error)
    """The cursor was reset."""


@dataclass(frozen=True)
class Delivery:
    """What a delivery did. Counts are of events: points, parameters, files."""

    delivered: int
    remaining: int
    refused: tuple[str, ...]  # events left out because no server will take them, and why
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
        trouble = replay.diagnose(error)
    return Delivery(replay.delivered, replay.pending(), tuple(replay.refused), trouble or replay.cursor_trouble)


def _is_unacceptable(error: Exception) -> bool:
    """Whether it would fail for ever: the event itself is at fault, not the server."""
    return isinstance(error, UnsendableError | FileNotFoundError) or getattr(error, "error_code", None) in _UNACCEPTABLE


def _num_lines(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

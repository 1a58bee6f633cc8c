"""Replays a run's journals to MLflow in the background: nothing is lost, nothing is told twice, nobody waits.

How far each journal has been delivered is kept in a cursor file, written after the delivery. A crash between the two
repeats the last delivery, which changes nothing (mlflow_sink.py).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.engine.storage import Storage
from pipelines.tracking.journal import read_events
from pipelines.tracking.mlflow_sink import Event, MlflowSink, UnsendableError
from pipelines.tracking.redact import redact
from pipelines.tracking.target import TrackingTarget

RUN_JOURNAL = "+run"  # a name that no stage can have
_EVENTS_AT_ONCE = 2000
_POLL_S = 0.5
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
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
        self._store = Storage(journal_dir.parent)
        self._cursor = self._load_cursor()
        self._sink: MlflowSink | None = None
        self.refused: list[str] = []  # events that the server does not accept, and why

    @property
    def mlflow_runs(self) -> dict[str, str]:
        """MLflow's run ids by stage, that of the pipeline run under "+run", as far as delivered."""
        return dict(self._cursor.mlflow_runs)

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
                anything |= self._deliver_journal(path)
        return anything

    def probe(self) -> None:
        """Return where the target answers, quickly. Raises what MLflow or the network raises where it does not."""
        (self._sink or MlflowSink(self._target, self._run_id)).ping()

    def _deliver_journal(self, path: Path) -> bool:
        position = self._position(path)
        chunk = list(islice(read_events(path, position.offset), _EVENTS_AT_ONCE))
        if not chunk:
            return False
        stage = path.name.split(".")[0]
        mlflow_run = self._mlflow_run(stage, chunk[0][0]["t"])
        metrics: list[Event] = []
        for event, end in chunk:
            if event["event"] == "metrics":
                metrics.append(event)
            else:
                self._send_metrics(mlflow_run, metrics)
                metrics = []
                if event["event"] == "start":
                    position.artifact_url = event["artifact_url"]
                self._send(mlflow_run, event, position.artifact_url)
                if event["event"] in ("artifact", "model", "json"):  # costly to repeat
                    self._advance(path, position, end)
        self._send_metrics(mlflow_run, metrics)
        self._advance(path, position, chunk[-1][1])
        return True

    def _mlflow_run(self, stage: str, time_ms: int) -> str:
        if self._sink is None:
            sink = MlflowSink(self._target, self._run_id)
            known = self._cursor.mlflow_runs.values()
            if not all(sink.is_there(mlflow_run) for mlflow_run in known):
                self._cursor = _Cursor()  # deleted in the store, or the store is another one: tell all of it again
                self._save_cursor()
                raise _StartAgain
            self._sink = sink
        if stage not in self._cursor.mlflow_runs:
            self._cursor.mlflow_runs[stage] = self._sink.open_run(None if stage == RUN_JOURNAL else stage, time_ms)
        return self._cursor.mlflow_runs[stage]

    def _send_metrics(self, mlflow_run: str, events: Sequence[Event]) -> None:
        assert self._sink is not None
        if not events:
            return
        try:
            self._sink.log_metrics(mlflow_run, events)
        except Exception as error:
            if not _is_unacceptable(error):
                raise
            if len(events) == 1:
                self._refuse(events[0], error)
                return
            middle = len(events) // 2
            self._send_metrics(mlflow_run, events[:middle])
            self._send_metrics(mlflow_run, events[middle:])

    def _send(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        assert self._sink is not None
        try:
            self._sink.apply(mlflow_run, event, artifact_url)
        except Exception as error:
            if not _is_unacceptable(error):
                raise
            self._refuse(event, error)

    def _refuse(self, event: Event, error: Exception) -> None:
        text = str(redact(f"{event['event']}: {type(error).__name__}: {error}"))
        log.warning("MLflow does not accept a journal event, it is left out: %s", text)
        self.refused.append(text)

    def _advance(self, path: Path, position: _Position, offset: int) -> None:
        position.offset = offset
        self._cursor.journals[path.name] = position
        self._save_cursor()

    def _position(self, path: Path) -> _Position:
        return self._cursor.journals.get(path.name, _Position()).model_copy()

    def _journals(self) -> list[Path]:
        return sorted(self._dir.glob("*.jsonl"))  # "+run" sorts before every stage

    def _load_cursor(self) -> _Cursor:
        try:
            return _Cursor.model_validate(json.loads((self._dir.parent / self._cursor_file).read_text()))
        except (FileNotFoundError, ValueError, ValidationError):
            return _Cursor()  # delivering again from the start changes nothing

    def _save_cursor(self) -> None:
        self._store.write_json_atomic(self._cursor_file, self._cursor.model_dump(mode="json"))


class Replayer:
    """Runs a Replay in a background thread and keeps on trying while the server is away."""

    def __init__(self, replay: Replay, notify: Callable[[str], None], shown_uri: str) -> None:
        self._replay, self._notify, self._shown_uri = replay, notify, shown_uri
        self._draining = threading.Event()
        self._drained = threading.Event()
        self._unreachable = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow replayer", daemon=True)

    def start(self) -> None:
        """Begin delivering."""
        self._thread.start()

    def drain(self, deadline_s: float) -> int:
        """Deliver what is left. Returns how many events remain for the next time.

        Waits at most `deadline_s` seconds, and only a few where the server does not answer.
        """
        long_s = deadline_s
        self._draining.set()
        while not self._drained.wait(0.1):
            deadline_s -= 0.1
            if deadline_s <= 0 or (self._unreachable.is_set() and deadline_s <= long_s - _PATIENCE_S):
                break
        return self._replay.pending()

    def _run(self) -> None:
        retry_s = 0.0
        while True:
            try:
                if self._unreachable.is_set():
                    self._replay.probe()
                    self._notify(f"MLflow at {self._shown_uri} answers again.")
                    self._unreachable.clear()
                    retry_s = 0.0
                if not self._replay.deliver():
                    if self._draining.is_set():
                        break
                    self._draining.wait(_POLL_S)
            except _StartAgain:
                continue
            except Exception as error:
                if not self._unreachable.is_set():
                    self._unreachable.set()
                    self._notify(
                        f"MLflow at {self._shown_uri} cannot be reached ({_brief(error)}). The run goes on; its "
                        "points are kept and delivered later."
                    )
                retry_s = min(_LAST_RETRY_S, 2 * retry_s or _FIRST_RETRY_S)
                if self._draining.is_set():
                    time.sleep(min(retry_s, _FIRST_RETRY_S))
                else:
                    self._draining.wait(retry_s)
        self._drained.set()


class _StartAgain(Exception):  # noqa: N818 (it is no error)
    """The cursor was reset."""


def deliver_all(replay: Replay) -> None:
    """Deliver everything there is, in the calling thread. Raises what MLflow or the network raises."""
    while True:
        try:
            if not replay.deliver():
                return
        except _StartAgain:
            continue


def _is_unacceptable(error: Exception) -> bool:
    """Whether it would fail for ever: the event itself is at fault, not the server."""
    return isinstance(error, UnsendableError | FileNotFoundError) or getattr(error, "error_code", None) in _UNACCEPTABLE


def _brief(error: Exception) -> str:
    text = str(redact(str(error))).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _num_lines(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

"""The tracking of one pipeline run: its journals, and their way to MLflow."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.errors import ConfigError
from pipelines.storage import Storage
from pipelines.tracking.journal import Journal, journal_name, journals_of, read_events
from pipelines.tracking.mlflow_sink import MlflowSink
from pipelines.tracking.replay import RUN_JOURNAL, Delivery, Replay, Replayer, deliver_all
from pipelines.tracking.spool import Spool
from pipelines.tracking.target import TrackingTarget
from pipelines.tracking.trouble import Cause, Trouble, diagnose

DRAIN_S = 30.0
_CHECK_S = 15.0


@dataclass(frozen=True)
class TrackingOptions:
    """What is tracked, and where it is shown."""

    target: TrackingTarget
    system_metrics: bool = True
    drain_s: float = DRAIN_S


class RunTracking:
    """Journals of a run that is being driven, replayed in the background between start() and stop()."""

    def __init__(
        self,
        storage: Storage,
        run_relpath: str,
        run_id: str,
        options: TrackingOptions,
        notify: Callable[[str], None],
        owner_number: int = 1,
    ) -> None:
        """`owner_number` is that of the driver's lease: it names the journals (journal.journal_name)."""
        self.options = options
        self._owner_number = owner_number
        self._spool = Spool(storage, run_relpath)
        self._run_id, self._notify = run_id, notify
        self._run_journal: Journal | None = None
        self._replayer: Replayer | None = None

    @property
    def journal_dir(self) -> Path:
        """Where the journals are on this machine."""
        return self._spool.journal_dir

    def start(self, tags: Mapping[str, str], config: Mapping[str, Any], all_reused: bool) -> None:
        """Begin: journal the pipeline run's own facts and deliver from now on.

        A run that succeeded before and has nothing to do (`all_reused`) has nothing to tell either.
        """
        self._spool.download()
        last = self.last_lifecycle_event(RUN_JOURNAL)
        target = self.options.target
        if not (all_reused and last is not None and last.get("status") == "SUCCEEDED"):
            if target.notice:
                self._notify(target.notice)
            self._run_journal = self.open_stage(RUN_JOURNAL)
            self._run_journal.write("start", tags=dict(tags), artifact_url=None)
            self._run_journal.log_json("config.json", dict(config))
        self._replayer = Replayer(Replay(self.journal_dir, target, self._run_id), self._notify, target.shown_uri)
        self._replayer.start()
        self._spool.start()

    def open_stage(self, name: str) -> Journal:
        """The journal of a stage, for the driver to write."""
        return Journal(self.journal_dir / journal_name(name, self._owner_number))

    def last_lifecycle_event(self, name: str) -> dict[str, Any] | None:
        """The last `start` or `end` event of a stage's journals."""
        last = None
        for event in self._events(name):
            if event["event"] in ("start", "end"):
                last = event
        return last

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Journal settings, in which secrets are masked already, as parameters of the pipeline run itself."""
        if self._run_journal is not None:
            self._run_journal.write("params", params=dict(settings))

    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Journal final figures as metrics of the pipeline run itself, except those that are told with this value.

        A stage whose result was deleted and made again may have another speed: the store shows the latest.
        """
        if self._run_journal is None:
            return
        told: dict[str, float] = {}
        for event in self._events(RUN_JOURNAL):
            if event["event"] == "metrics":
                told |= event["values"]
        fresh = {name: float(value) for name, value in figures.items() if told.get(name) != value}
        if fresh:
            self._run_journal.write("metrics", step=0, values=fresh)

    def _events(self, name: str) -> Iterator[dict[str, Any]]:
        for path in journals_of(self.journal_dir, name):
            for event, _ in read_events(path):
                yield event

    @property
    def trouble(self) -> Trouble | None:
        """Why points wait to be delivered, if they do."""
        return self._replayer.trouble if self._replayer is not None else None

    def stop(self, status: str, tags: Mapping[str, str]) -> int:
        """End the pipeline run with a status; deliver for a while. Returns how many events remain undelivered."""
        remaining = 0
        if self._run_journal is not None:
            self._run_journal.write("end", status=status, tags=dict(tags))
            self._run_journal.close()
        if self._replayer is not None:
            remaining = self._replayer.drain(self.options.drain_s)
        self._spool.stop()
        return remaining


def sync(
    storage: Storage,
    run_relpath: str,
    run_id: str,
    target: TrackingTarget,
    on_progress: Callable[[int, int], None] = lambda delivered, total: None,
) -> Delivery:
    """Deliver what an ended run left undelivered, as far as it goes. Nothing of MLflow's or the network is raised."""
    spool = Spool(storage, run_relpath)
    spool.download()
    delivery = deliver_all(Replay(spool.journal_dir, target, run_id), on_progress)
    if delivery.delivered:
        spool.upload()
    return delivery


def check_target(target: TrackingTarget, run_id: str, patience_s: float = _CHECK_S) -> None:
    """Connect to the store once before a run begins. One that is away, or slow to answer, is no obstacle.

    Raises: ConfigError: the store would refuse the run's points for good.
    """
    if find_spec("mlflow") is None:
        raise ConfigError(diagnose(ModuleNotFoundError("No module named 'mlflow'", name="mlflow"), target).text)
    if not _listens(target.uri):
        return
    found: list[Exception] = []

    def connect() -> None:
        try:
            MlflowSink(target, run_id).connect()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=connect, name="mlflow check", daemon=True)
    thread.start()
    thread.join(patience_s)
    if found and (trouble := diagnose(found[0], target)).cause is Cause.REFUSED:
        raise ConfigError(trouble.text) from found[0]


def _listens(uri: str) -> bool:
    """Whether there is a server at all: quicker to know than to import MLflow. True for what is not a server."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return True
    try:
        socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), 3).close()
    except OSError:
        return False
    return True


class JournalWatch:
    """Tells a callback about metrics as they are journalled by this process or by the workers' actor, in a thread."""

    def __init__(
        self, paths: list[Path], on_metrics: Callable[[int, dict[str, float]], None], poll_s: float = 0.5
    ) -> None:
        self._offsets = {path: path.stat().st_size if path.exists() else 0 for path in paths}
        self._on_metrics, self._poll_s = on_metrics, poll_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal watch", daemon=True)

    def __enter__(self) -> JournalWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stopped.wait(self._poll_s):
            self._look()

    def _look(self) -> None:
        for path, offset in self._offsets.items():
            for event, end in read_events(path, offset):
                self._offsets[path] = end
                if event["event"] == "metrics":
                    self._on_metrics(event["step"], event["values"])

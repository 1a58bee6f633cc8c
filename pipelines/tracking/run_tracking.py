"""The tracking of one pipeline run: its journals, and their way to the sinks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.errors import ConfigError
from pipelines.storage import Storage
from pipelines.tracking.journal import NOTICE, Journal, journal_name, journals_of, read_events
from pipelines.tracking.replay import RUN_JOURNAL, Backlog, Delivery, Replay, Replayer, deliver_all
from pipelines.tracking.sink import Target
from pipelines.tracking.spool import Spool
from pipelines.tracking.trouble import Cause

DRAIN_S = 30.0
_CHECK_S = 15.0
_LIVE_EVERY_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackingOptions:
    """What is tracked, and where it is shown."""

    targets: tuple[Target, ...]
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
        self._storage, self._run_relpath = storage.with_retry_s(0), run_relpath
        self._live: dict[str, Mapping[str, Any]] = {}
        self._live_at = 0.0
        self._spool = Spool(storage, run_relpath)
        self._run_id, self._notify = run_id, notify
        self._run_journal: Journal | None = None
        self._replayers: list[Replayer] = []

    @property
    def journal_dir(self) -> Path:
        """Where the journals are on this machine."""
        return self._spool.journal_dir

    @property
    def log_dir(self) -> Path:
        """Where the output of the stages' processes is kept on this machine."""
        return self._spool.log_dir

    def journal_path(self, name: str) -> Path:
        """The journal of a stage under this owner."""
        return self.journal_dir / journal_name(name, self._owner_number)

    def start(self, tags: Mapping[str, str], config: Mapping[str, Any], all_reused: bool) -> None:
        """Begin: journal the pipeline run's own facts and deliver from now on.

        A run that succeeded before and has nothing to do (`all_reused`) has nothing to tell either.
        """
        self._spool.download()
        last = self.last_lifecycle_event(RUN_JOURNAL)
        if not (all_reused and last is not None and last.get("status") == "SUCCEEDED"):
            for target in self.options.targets:
                if target.notice:
                    self._notify(target.notice)
            self._run_journal = self.open_stage(RUN_JOURNAL)
            self._run_journal.write("start", tags=dict(tags), artifact_url=None)
            self._run_journal.log_json("config.json", dict(config))
        for target in self.options.targets:
            self._replayers.append(Replayer(Replay(self.journal_dir, target, self._run_id), self._notify))
            self._replayers[-1].start()
        self._spool.start()

    def open_stage(self, name: str) -> Journal:
        """The journal of a stage, for the driver to write."""
        return Journal(self.journal_path(name))

    def note_live(self, samples: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep a fresh picture of how far the running stages are, for `bmojo status --watch`; at most every 5 s."""
        now = time.monotonic()
        if now < self._live_at + _LIVE_EVERY_S or samples == self._live:
            return
        self._live_at, self._live = now, dict(samples)
        try:
            picture = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "stages": samples}
            self._storage.write_json_atomic(live_relpath(self._run_relpath, self._owner_number), picture)
        except Exception as error:  # the log has samples too
            log.warning("Could not note how far the run is: %s", error)

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

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Journal tags of the pipeline run itself that have changed."""
        if self._run_journal is not None:
            self._run_journal.log_tags(tags)

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

    def stop(self, status: str, tags: Mapping[str, str]) -> tuple[Backlog, ...]:
        """End the pipeline run with a status; deliver for a while. Returns what remains, by sink."""
        if self._run_journal is not None:
            self._run_journal.write("end", status=status, tags=dict(tags))
            self._run_journal.close()
        for replayer in self._replayers:
            replayer.end_when_drained()
        backlogs = [replayer.drain(self.options.drain_s) for replayer in self._replayers]
        self._spool.stop()
        return tuple(backlog for backlog in backlogs if backlog is not None)


def sync(
    storage: Storage,
    run_relpath: str,
    run_id: str,
    target: Target,
    on_progress: Callable[[int, int], None] = lambda delivered, total: None,
) -> Delivery:
    """Deliver to one target what an ended run left undelivered, as far as it goes. No error of the sink is raised."""
    spool = Spool(storage, run_relpath)
    spool.download()
    delivery = deliver_all(Replay(spool.journal_dir, target, run_id), on_progress)
    if delivery.delivered:
        spool.upload()
    return delivery


def check_target(target: Target, run_id: str, patience_s: float = _CHECK_S) -> None:
    """Connect to the target once before a run begins. One that is away, or slow to answer, is no obstacle.

    Raises: ConfigError: it would refuse the run's points for good.
    """
    if find_spec(target.package) is None:
        missing = ModuleNotFoundError(f"No module named {target.package!r}", name=target.package)
        raise ConfigError(target.diagnose(missing).text)
    if not target.answers():
        return
    found: list[Exception] = []

    def connect() -> None:
        try:
            target.open(run_id)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=connect, name=f"{target.name} check", daemon=True)
    thread.start()
    thread.join(patience_s)
    if found and (trouble := target.diagnose(found[0])).cause is Cause.REFUSED:
        raise ConfigError(trouble.text) from found[0]


def live_relpath(run_relpath: str, owner_number: int) -> str:
    """The file of RunTracking.note_live."""
    return f"{run_relpath}/live-{owner_number:06d}.json"


class JournalWatch:
    """Tells callbacks about metrics and notices as this process or the workers' actor journals them, in a thread."""

    def __init__(
        self,
        paths: list[Path],
        on_metrics: Callable[[int, dict[str, float]], None],
        on_notice: Callable[[str], None] = lambda text: None,
        poll_s: float = 0.5,
    ) -> None:
        self._offsets = {path: path.stat().st_size if path.exists() else 0 for path in paths}
        self._on_metrics, self._on_notice, self._poll_s = on_metrics, on_notice, poll_s
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
                elif event["event"] == "tags" and NOTICE in event["tags"]:
                    self._on_notice(event["tags"][NOTICE])

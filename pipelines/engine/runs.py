"""Runs in a storage: <storage>/runs/<run_id>/ holds the event log, journals, logs and tracebacks of one run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

from base.errors import DamagedError, UserError
from base.names import close_names, did_you_mean
from pipelines.engine.event_log import EventLog, positions, read_event, read_history
from pipelines.engine.events import RunInfo, Status, utc_now
from pipelines.engine.fingerprint import SHORT_DIGITS, Fingerprint, digest_json
from pipelines.engine.lease import Lease, LeaseHeldError, LeaseInfo, Watch, break_lease, last_holder, lease_holder
from pipelines.engine.state import EXIT_CODES, UNFINISHED, RunState, StageState, fold
from pipelines.storage import Storage
from pipelines.storage.artifact import ArtifactDir

RUNS = "runs"
ARTIFACTS = "artifacts"


class Run:
    """One run directory. What the run is and how far it got is folded from its event log (event_log.py)."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.storage = storage
        self.run_id = run_id
        self.relpath = f"{RUNS}/{run_id}"

    def __repr__(self) -> str:
        return f"Run({self.url!r})"

    @property
    def url(self) -> str:
        """The run directory's absolute path or URL."""
        return self.storage.url_of(self.relpath)

    @property
    def lease_relpath(self) -> str:
        """The lease that makes one driver the owner."""
        return f"{self.relpath}/lease"

    @property
    def remedy(self) -> str:
        """The commands for whoever finds that the run has an owner."""
        at = f"{self.run_id} --storage {shlex.quote(self.storage.url)}"
        return f"To stop it: bmojo cancel {at}. If that process is gone for good: bmojo unlock {at}."

    @property
    def events_relpath(self) -> str:
        """The event log."""
        return f"{self.relpath}/events"

    def info(self) -> RunInfo:
        """What the run is. Raises UserError where the log is damaged or missing."""
        return self.stored_state().info

    def state(self, on_watch: Watch | None = None, read: Callable[[], RunState] | None = None) -> RunState:
        """How far it is: a RUNNING one whose driver is gone is RESUMABLE, as are its unfinished stages.

        Args: on_watch: called if the driver is on another machine and must be watched for some seconds.
            read: gives what stored_state does, such as History.refresh.
        """
        read = read or self.stored_state
        state = read()
        while state.status is Status.RUNNING and self.holder(on_watch) is None:
            before, state = state, read()
            if before == state:  # it did not end, and no successor came, while we looked
                return self._abandoned(state)
        return state

    def stored_state(self) -> RunState:
        """How far the last owner got, whether it still lives or not. Raises as info."""
        try:
            state = fold(read_history(self.storage, self.events_relpath))
        except DamagedError as error:
            raise DamagedError(f"{error} Delete {self.url} and run again: finished stages are kept.") from error
        if state is None:
            raise UserError(
                f"Run {self.run_id} has no history: {self.storage.url_of(self.events_relpath)} is missing. It was "
                "deleted, or an earlier version of this program made the run. Run the pipeline file again: finished "
                "stages are reused."
            )
        return state

    def started_at(self) -> str:
        """When the run was first started, "" where its log does not tell."""
        first = positions(self.storage, self.events_relpath)[:1]
        try:
            return "".join(read_event(self.storage, self.events_relpath, position).at for position in first)
        except (UserError, FileNotFoundError):
            return ""

    def holder(self, on_watch: Watch | None = None) -> LeaseInfo | None:
        """The driver of this run, if one is running; see lease_holder."""
        return lease_holder(self.storage, self.lease_relpath, on_watch)

    def exists(self) -> bool:
        """Whether the run was ever started."""
        return bool(self.storage.list(self.events_relpath))

    def log(self, number: int) -> EventLog:
        """The event log for the owner with lease `number` to append to; those before it are sealed."""
        return EventLog(self.storage, self.events_relpath, number)

    def write_text(self, name: str, text: str) -> str:
        """Keep a file beside the log, such as a traceback. Returns its path or URL."""
        self.storage.write_bytes_atomic(f"{self.relpath}/{name}", text.encode())
        return self.storage.url_of(f"{self.relpath}/{name}")

    def request_cancel(self, on_watch: Watch | None = None) -> LeaseInfo:
        """Ask the owner to stop; it notices at its next heartbeat. Its successor, if it gets one, is not meant.

        Raises: UserError: no driver is running.
        """
        holder = self.holder(on_watch)
        if holder is None:
            raise UserError(f"Run {self.run_id} is not running ({self.state().status}): there is nothing to cancel.")
        number, _ = last_holder(self.storage, self.lease_relpath)
        self.storage.write_json_atomic(self._cancel_file(number), {"requested_at": utc_now()})
        return holder

    def cancel_requested(self, number: int) -> bool:
        """Whether somebody asked the owner with lease `number` to stop."""
        return self.storage.exists(self._cancel_file(number))

    def artifact_of(self, stage: StageState) -> ArtifactDir | None:
        """Where a stage's result is; None where there is none yet."""
        if stage.artifact is None:
            return None
        if stage.artifact.startswith(f"{ARTIFACTS}/"):
            return ArtifactDir(self.storage, stage.artifact)
        return ArtifactDir.at(stage.artifact)  # an earlier version kept the absolute URL

    def _abandoned(self, state: RunState) -> RunState:
        stages = {
            name: stage.model_copy(update={"status": Status.RESUMABLE})
            if stage.status in UNFINISHED and stage.status is not Status.PENDING
            else stage
            for name, stage in state.stages.items()
        }
        _, last = last_holder(self.storage, self.lease_relpath)
        who = f" ({last.owner}, {last.last_seen})" if last is not None and not last.released else ""
        error = state.error or f"its driver is gone{who}"
        changes = {
            "status": Status.RESUMABLE,
            "stages": stages,
            "error": error,
            "exit_code": EXIT_CODES[Status.RESUMABLE],
        }
        return state.model_copy(update=changes)

    def _cancel_file(self, number: int) -> str:
        return f"{self.relpath}/cancel-{number:06d}.json"


def run_id_of(name: str, fingerprints: Mapping[str, Fingerprint]) -> str:
    """<name>-<8 digits>: the same pipeline with the same stages is the same run, so the same command finds it again."""
    return f"{name}-{digest_json({stage: fingerprint.digest for stage, fingerprint in fingerprints.items()})[:8]}"


def list_runs(storage: Storage) -> list[Run]:
    """All runs of a storage, the latest started last."""
    runs = [Run(storage, run_id) for run_id in storage.list(RUNS)]
    return sorted((run for run in runs if run.exists()), key=Run.started_at)


def find_run(storage: Storage, wanted: str | None = None) -> Run:
    """A run by its id, the beginning of its id, or its pipeline's name (the latest run of it); by default the latest
    of all.

    Raises: UserError: there is none, or the beginning fits several.
    """
    runs = list_runs(storage)
    if not runs:
        raise UserError(f"There are no runs in {storage.url}. Start one: bmojo run CONFIG.")
    if wanted is None:
        return runs[-1]
    for candidates in (
        [run for run in runs if run.run_id == wanted],
        [run for run in runs if re.fullmatch(re.escape(wanted) + "-[0-9a-f]{8}", run.run_id)][-1:],
        [run for run in runs if run.run_id.startswith(wanted)],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = ", ".join(run.run_id for run in candidates)
            raise UserError(f"{wanted!r} fits several runs: {names}. Give more of the id.")
    known = [run.run_id for run in runs]
    near = did_you_mean(close_names(wanted, [*dict.fromkeys(name.rpartition("-")[0] for name in known), *known]))
    raise UserError(f"There is no run {wanted!r} in {storage.url}.{near} The latest: {', '.join(known[-10:])}.")


def delete_run(run: Run, with_artifacts: bool = False, on_watch: Watch | None = None) -> list[str]:
    """Remove a run's state and, on request, those of its artifacts that no other run names. Returns what was removed.

    Raises: UserError: a driver is running, or a file that says what belongs to whom is damaged.
    """
    lease = Lease.acquire(
        run.storage, run.lease_relpath, f"Run {run.run_id}", remedy=run.remedy, on_watch=on_watch
    )  # so that no driver starts meanwhile
    removed = []
    try:
        if with_artifacts:
            kept = {
                path for other in list_runs(run.storage) if other.run_id != run.run_id for path in _artifacts(other)
            }
            for relpath in sorted(_artifacts(run) - kept):
                run.storage.delete(f"{relpath}/record.json")  # first, so that half a deletion does not look finished
                run.storage.delete(relpath)
                removed.append(run.storage.url_of(relpath))
    except BaseException:
        lease.release()
        raise
    lease.stop()
    run.storage.delete(run.relpath)
    return [*removed, run.url]


def dead_leases(run: Run) -> list[tuple[str, str, LeaseInfo]]:
    """What unlock_run would break: (path, what it is, its owner) of the run's lease and those of its unfinished
    stages that somebody holds. Whether that owner lives is not asked."""
    candidates = [(run.lease_relpath, f"Run {run.run_id}")]
    try:
        stages = run.stored_state().stages
    except UserError:  # its driver died before it wrote one
        stages = {}
    for name, stage in stages.items():
        if stage.status is not Status.SUCCEEDED:
            relpath = artifact_lease_relpath(stage.kind, name, stage.fingerprint)
            candidates.append((relpath, f"Artifact of stage {name}"))
    found = [(relpath, what, last_holder(run.storage, relpath)[1]) for relpath, what in candidates]
    return [(relpath, what, info) for relpath, what, info in found if info is not None and not info.released]


def unlock_run(run: Run, on_watch: Watch | None = None) -> list[str]:
    """Break the lease of a run, and those of its stages, whose owner is dead. Returns what was broken, in words.

    Raises: LeaseHeldError: the owner of the run is alive. A stage that another, live run works on is left alone.
    """
    broken = []
    for relpath, what, _ in dead_leases(run):
        try:
            holder = break_lease(run.storage, relpath, what, run.remedy, on_watch)
        except LeaseHeldError:
            if relpath == run.lease_relpath:
                raise
            continue
        if holder is not None:
            broken.append(f"{what}: was held by {holder}, {holder.last_seen}")
    return broken


def artifact_lease_relpath(kind: str, name: str, fingerprint: str) -> str:
    """The lease that makes one driver the maker of an artifact."""
    return f"leases/{kind}-{name}-{fingerprint[:SHORT_DIGITS]}"


def _artifacts(run: Run) -> set[str]:
    """Paths in the run's storage."""
    artifacts = (run.artifact_of(stage) for stage in run.stored_state().stages.values())
    urls = {artifact.url for artifact in artifacts if artifact is not None}
    inside = run.storage.url + "/"
    return {url.removeprefix(inside) for url in urls if url.startswith(inside)}

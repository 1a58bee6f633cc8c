"""Run state in storage: <storage>/runs/<run_id>/ holds what was asked (run.json) and how far it got (state.json)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.engine.fingerprint import Fingerprint, digest_json
from pipelines.engine.lease import LeaseInfo, lease_holder
from pipelines.engine.storage import Storage
from pipelines.errors import UserError

RUNS = "runs"


class Status(StrEnum):
    """How far a run or a stage is. FAILED is the user's error, RESUMABLE the cluster's fault or an interruption."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    RESUMABLE = "RESUMABLE"
    CANCELLED = "CANCELLED"


class RunInfo(BaseModel):
    """What a run is. Written once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    name: str
    config: dict[str, Any]  # the whole pipeline file as resolved, secrets masked
    config_path: str | None
    created_at: str
    git_commit: str | None
    fingerprints: dict[str, str]


class StageState(BaseModel):
    """How far one stage of a run is. Times are ISO 8601 in UTC."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    status: Status = Status.PENDING
    fingerprint: str
    artifact: str | None = None  # URL or absolute path, once there is one
    reused: bool = False
    started_at: str | None = None
    finished_at: str | None = None
    error: str | None = None


class RunState(BaseModel):
    """How far a run is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Status = Status.PENDING
    started_at: str | None = None
    finished_at: str | None = None
    error: str | None = None
    stages: dict[str, StageState]

    def with_stage(self, name: str, **changes: Any) -> RunState:
        """A copy in which one stage has changed."""
        stage = self.stages[name].model_copy(update=changes)
        return self.model_copy(update={"stages": {**self.stages, name: stage}})


class Run:
    """One run directory."""

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

    def info(self) -> RunInfo:
        """What the run is. Raises UserError where run.json is damaged or missing."""
        return self._read("run.json", RunInfo)

    def state(self) -> RunState:
        """How far it is: a RUNNING one whose driver is gone is RESUMABLE, as are its RUNNING stages."""
        state = self._read("state.json", RunState)
        if state.status is not Status.RUNNING or self.holder() is not None:
            return state
        stages = {
            name: stage.model_copy(update={"status": Status.RESUMABLE}) if stage.status is Status.RUNNING else stage
            for name, stage in state.stages.items()
        }
        error = state.error or "its driver is gone"
        return state.model_copy(update={"status": Status.RESUMABLE, "stages": stages, "error": error})

    def holder(self) -> LeaseInfo | None:
        """The driver that is at work on this run, if any."""
        return lease_holder(self.storage, self.lease_relpath)

    def exists(self) -> bool:
        """Whether the run was ever started."""
        return self.storage.exists(f"{self.relpath}/run.json")

    def write_info(self, info: RunInfo) -> None:
        """Write run.json (the resources or tracking of a continued run may differ from the first time)."""
        self.storage.write_json_atomic(f"{self.relpath}/run.json", info.model_dump(mode="json"))

    def write_state(self, state: RunState) -> None:
        """Replace state.json. Only the owner of the lease may."""
        self.storage.write_json_atomic(f"{self.relpath}/state.json", state.model_dump(mode="json"))

    def write_text(self, name: str, text: str) -> str:
        """Keep a file beside the state, such as a traceback. Returns its path or URL."""
        self.storage.write_bytes_atomic(f"{self.relpath}/{name}", text.encode())
        return self.storage.url_of(f"{self.relpath}/{name}")

    def request_cancel(self) -> LeaseInfo:
        """Ask the owner to stop; it notices at its next heartbeat. Raises UserError where nobody is at work on the "
        "run."""
        holder = self.holder()
        if holder is None:
            raise UserError(f"Run {self.run_id} is not running ({self.state().status}): there is nothing to cancel.")
        self.storage.write_json_atomic(f"{self.relpath}/cancel.json", {"requested_at": utc_now()})
        return holder

    def cancel_requested(self) -> bool:
        """Whether somebody asked the owner to stop."""
        return self.storage.exists(f"{self.relpath}/cancel.json")

    def clear_cancel(self) -> None:
        """Forget a request to stop."""
        self.storage.delete(f"{self.relpath}/cancel.json")

    def _read(self, name: str, model: type[Any]) -> Any:
        relpath = f"{self.relpath}/{name}"
        try:
            return model.model_validate(self.storage.read_json(relpath))
        except FileNotFoundError as error:
            raise UserError(f"Run {self.run_id} has no {name}: {self.storage.url_of(relpath)} is missing.") from error
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(
                f"{self.storage.url_of(relpath)} is damaged, or another version of this program wrote it: "
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}. Delete {self.url} and run again: finished "
                "stages are kept."
            ) from error


def run_id_of(name: str, fingerprints: Mapping[str, Fingerprint]) -> str:
    """<name>-<8 digits>: the same pipeline with the same stages is the same run, so the same command finds it again."""
    return f"{name}-{digest_json({stage: fingerprint.digest for stage, fingerprint in fingerprints.items()})[:8]}"


def list_runs(storage: Storage) -> list[Run]:
    """All runs of a storage, the latest started last."""
    runs = [Run(storage, run_id) for run_id in storage.list(RUNS)]
    return sorted((run for run in runs if run.exists()), key=_started_at)


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
    names = ", ".join(run.run_id for run in runs[-10:])
    raise UserError(f"There is no run {wanted!r} in {storage.url}. The latest: {names}.")


def delete_run(run: Run, with_artifacts: bool = False) -> list[str]:
    """Remove a run's state and, on request, those of its artifacts that no other run names. Returns what was removed.

    Raises: UserError: a driver is at work on the run.
    """
    holder = run.holder()
    if holder is not None:
        raise UserError(f"Run {run.run_id} is being worked on by {holder}. Cancel it first: bmojo cancel {run.run_id}.")
    removed = []
    if with_artifacts:
        kept = {url for other in list_runs(run.storage) if other.run_id != run.run_id for url in _artifacts(other)}
        for url in sorted(_artifacts(run) - kept):
            relpath = url.removeprefix(run.storage.url).lstrip("/")
            run.storage.delete(f"{relpath}/record.json")  # first, so that half a deletion does not look finished
            run.storage.delete(relpath)
            removed.append(url)
    run.storage.delete(run.relpath)
    return [*removed, run.url]


def utc_now() -> str:
    """Now, as stored: ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _artifacts(run: Run) -> set[str]:
    return {stage.artifact for stage in run.state().stages.values() if stage.artifact}


def _started_at(run: Run) -> str:
    try:
        return run.state().started_at or run.info().created_at
    except UserError:
        return ""

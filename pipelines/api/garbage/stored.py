"""Garbage in a storage: artifacts that no run names, what deleted runs left, unfinished writes of killed processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.files import is_temporary, usage
from pipelines.api.garbage.found import Garbage, Limits, Thing, What, age_s, is_old
from pipelines.engine.fingerprint import SHORT_DIGITS
from pipelines.engine.lease import Lease, LeaseHeldError, Watch, lease_holder
from pipelines.engine.runs import ARTIFACTS, RUNS, Run, artifact_lease_relpath
from pipelines.storage import LocalStorage, Storage
from pipelines.storage.artifact import RECORD, ArtifactDir

_LEASES = artifact_lease_relpath("", "", "").partition("/")[0]
_UNFINISHED_FOLDER = ".creating-"  # of MLflow's store (tracking.mlflow.store)
_WRITE_TEST = ".bmojo-write-test-"  # Storage.check_writable


class Stored:
    """One look at a storage. `notes` says what was left alone."""

    def __init__(self, storage: Storage, limits: Limits, on_watch: Watch | None = None) -> None:
        self._storage, self._limits, self._on_watch = storage, limits, on_watch
        self._runs: list[str] = []
        self._named: set[str] = set()
        self.notes: list[str] = []

    def find(self) -> Iterator[Thing]:
        """What may go."""
        damaged = self._read_runs()
        self.notes += [f"Artifacts and leases are left alone, because a run is damaged: {text}" for text in damaged]
        if not damaged:
            artifacts = self._artifacts()
            yield from self._unnamed(artifacts)
            yield from self._left_leases(set(artifacts))
        yield from self._empty_runs()
        if isinstance(self._storage, LocalStorage):
            yield from self._unfinished_writes(self._storage)

    def _read_runs(self) -> list[str]:
        """Note which artifacts the runs name. Returns what is wrong with those that cannot be read."""
        self._runs = self._storage.list(RUNS)
        named: set[str] = set()
        damaged = []
        for run in (Run(self._storage, run_id) for run_id in self._runs):
            if not run.exists():
                continue
            try:
                named |= _named_by(run)
            except UserError as error:
                damaged.append(str(error))
        self._named = self._with_referred(named)
        return damaged

    def _with_referred(self, named: set[str]) -> set[str]:
        """With the artifacts that records of these refer to, such as the tokenizer of a model."""
        todo, seen = list(named), set(named)
        while todo:
            try:
                record = self._storage.read_json(f"{todo.pop()}/{RECORD}")
            except (FileNotFoundError, UserError):
                continue
            fresh = set(_references(record.get("output"))) - seen
            seen |= fresh
            todo += fresh
        return seen

    def _artifacts(self) -> list[str]:
        storage = self._storage
        return [
            f"{ARTIFACTS}/{kind}/{name}"
            for kind in storage.list(ARTIFACTS)
            for name in storage.list(f"{ARTIFACTS}/{kind}")
        ]

    def _unnamed(self, artifacts: list[str]) -> Iterator[Thing]:
        for relpath in artifacts:
            if relpath not in self._named and not self._is_held(_lease_of(relpath)):
                finished = self._storage.exists(f"{relpath}/{RECORD}")
                reason = "no run names it" if finished else "unfinished, and no run names it"
                yield from self._thing("artifact", relpath, reason, partial(self._delete_artifact, relpath))

    def _left_leases(self, artifacts: set[str]) -> Iterator[Thing]:
        known = {_lease_of(relpath) for relpath in artifacts | self._named}
        for name in self._storage.list(_LEASES):
            relpath = f"{_LEASES}/{name}"
            if relpath not in known and not self._is_held(relpath):
                yield from self._thing(
                    "lease",
                    relpath,
                    "there is no such artifact, nobody holds it",
                    partial(self._delete_held, relpath, relpath),
                )

    def _empty_runs(self) -> Iterator[Thing]:
        for run in (Run(self._storage, run_id) for run_id in self._runs):
            if not run.exists() and not self._is_held(run.lease_relpath):
                delete = partial(self._delete_held, run.relpath, run.lease_relpath)
                yield from self._thing("run", run.relpath, "its driver died before it began", delete)

    def _unfinished_writes(self, storage: LocalStorage) -> Iterator[Thing]:
        root = storage.path()
        for parent, folders, names in os.walk(root):
            left = [name for name in names if is_temporary(name) or name.startswith(_WRITE_TEST)]
            left += [name for name in folders if name.startswith(_UNFINISHED_FOLDER)]
            folders[:] = [name for name in folders if not name.startswith(_UNFINISHED_FOLDER)]
            for name in left:
                relpath = (Path(parent) / name).relative_to(root).as_posix()
                owner = _owner_of(relpath)
                if owner is None or not self._is_held(owner):
                    reason = "the process that wrote it was killed"
                    yield from self._thing("unfinished write", relpath, reason, partial(self._delete_write, relpath))

    def _thing(self, what: What, relpath: str, reason: str, delete: Callable[[], str | None]) -> Iterator[Thing]:
        room = self._storage.usage(relpath)
        if is_old(room, self._limits.older_than_s):
            garbage = Garbage(
                what=what,
                path=self._storage.url_of(relpath),
                size_bytes=room.size_bytes,
                num_files=room.num_files,
                age_s=age_s(room),
                reason=reason,
            )
            yield Thing(garbage, delete)

    def _is_held(self, lease_relpath: str) -> bool:
        return lease_holder(self._storage, lease_relpath, self._on_watch) is not None

    def _delete_artifact(self, relpath: str) -> str | None:
        """As its owner, so that nobody makes it meanwhile; unless a new run names it by now."""
        lease_relpath = _lease_of(relpath)
        try:
            lease = Lease.acquire(self._storage, lease_relpath, f"Artifact {relpath}", on_watch=self._on_watch)
        except LeaseHeldError as error:
            return str(error)
        try:
            if self._storage.list(RUNS) != self._runs and self._read_runs():
                return "a run is damaged"
            if relpath in self._named:
                return "a run names it by now"
            self._storage.delete(f"{relpath}/{RECORD}")  # first, so that half a deletion does not look finished
            ArtifactDir(self._storage, relpath).delete()
            lease.stop()
            self._storage.delete(lease_relpath)
        finally:
            lease.release()
        return None

    def _delete_held(self, relpath: str, lease_relpath: str) -> str | None:
        """Delete what has nothing but a lease, as its owner."""
        try:
            lease = Lease.acquire(self._storage, lease_relpath, relpath, on_watch=self._on_watch)
        except LeaseHeldError as error:
            return str(error)
        lease.stop()
        if relpath != lease_relpath and Run(self._storage, Path(relpath).name).exists():
            lease.release()
            return "it has begun by now"
        self._storage.delete(relpath)
        return None

    def _delete_write(self, relpath: str) -> str | None:
        assert isinstance(self._storage, LocalStorage)
        path = self._storage.path(relpath)
        if path.exists() and not is_old(usage(path), self._limits.older_than_s):
            return "it was written to meanwhile"
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return None


def _named_by(run: Run) -> set[str]:
    """The artifacts of a run: those it has, and those it would make."""
    stages = run.stored_state().stages
    made = {stage.artifact for stage in stages.values() if stage.artifact is not None}
    return made | {
        f"{ARTIFACTS}/{stage.kind}/{name}-{stage.fingerprint[:SHORT_DIGITS]}" for name, stage in stages.items()
    }


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, str) and value.startswith(f"{ARTIFACTS}/"):
        yield "/".join(value.split("/")[:3])


def _lease_of(artifact: str) -> str:
    _, kind, name = artifact.split("/")
    return f"{_LEASES}/{kind}-{name}"


def _owner_of(relpath: str) -> str | None:
    """The lease of whoever may write this file; None: nobody needs one for it."""
    parts = relpath.split("/")
    if parts[0] == ARTIFACTS and len(parts) > 3:
        return _lease_of("/".join(parts[:3]))
    if parts[0] == RUNS and len(parts) > 2:
        return Run(LocalStorage("."), parts[1]).lease_relpath
    return "/".join(parts[:2]) if parts[0] == _LEASES and len(parts) > 2 else None

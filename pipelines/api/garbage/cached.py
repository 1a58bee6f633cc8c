"""Garbage in this machine's cache folder: what was not used for long, and what deleted runs left."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from base.cache import cache_dir
from pipelines.api.garbage.found import Garbage, Limits, Thing, What
from pipelines.engine.lease import lease_holder
from pipelines.engine.runs import ARTIFACTS, Run, artifact_lease_relpath
from pipelines.storage import LocalStorage, Storage
from pipelines.storage.artifact import SCRATCH, ArtifactDir
from pipelines.tracking.spool import SPOOL, Spool


@dataclass(frozen=True)
class _Unit:
    """What is deleted as a whole: a file, or the scratch copy of an artifact."""

    group: str  # the folder or file at the top of the cache
    path: Path
    size_bytes: int
    num_files: int
    used_at: float


def cached(storage: Storage, limits: Limits) -> Iterator[Thing]:
    """What may go: a thing per scratch copy and per left spool, and one for each other part of the cache."""
    root = cache_dir()
    if not root.is_dir():
        return
    units = sorted(_units(root, _in_use(storage)), key=lambda unit: unit.used_at)
    now = time.time()
    room = sum(unit.size_bytes for unit in units)
    chosen: dict[str, list[_Unit]] = {}
    for unit in units:
        is_unused = now - unit.used_at >= limits.cache_older_than_s
        if is_unused or (limits.cache_max_bytes is not None and room > limits.cache_max_bytes):
            room -= unit.size_bytes
            key = str(unit.path) if unit.group == SCRATCH else str(root / unit.group)
            chosen.setdefault(key, []).append(unit)
    for path, found in chosen.items():
        yield _thing("cache", path, found, _reason(found, now, limits))
    for unit in _left_spools(root / SPOOL, storage):
        if now - unit.used_at >= limits.older_than_s:
            reason = "its run is no longer in the storage"
            yield _thing("spool", str(unit.path), [unit], reason)


def _thing(what: What, path: str, units: Sequence[_Unit], reason: str) -> Thing:
    garbage = Garbage(
        what=what,
        path=path,
        size_bytes=sum(unit.size_bytes for unit in units),
        num_files=sum(unit.num_files for unit in units),
        age_s=max(0.0, time.time() - max(unit.used_at for unit in units)),
        reason=reason,
    )
    return Thing(garbage, partial(_delete, units))


def _reason(units: Sequence[_Unit], now: float, limits: Limits) -> str:
    days = limits.cache_older_than_s / 86400
    if all(now - unit.used_at >= limits.cache_older_than_s for unit in units):
        return f"not used for {days:g} days"
    return "the cache is larger than it may be"


def _units(root: Path, in_use: set[Path]) -> Iterator[_Unit]:
    for entry in root.iterdir():
        if entry.name == SPOOL:  # may hold what is nowhere else
            continue
        if entry.name == SCRATCH:
            yield from (_unit(entry.name, path) for path in entry.iterdir() if path not in in_use)
        elif entry.is_dir():
            files = (Path(parent) / name for parent, _, names in os.walk(entry) for name in names)
            yield from (_unit(entry.name, path) for path in files)
        else:
            yield _unit(entry.name, entry)


def _unit(group: str, path: Path) -> _Unit:
    """Reading counts as use; where the system does not note it, only writing does."""
    walked = [Path(parent) / name for parent, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    stats = [file.lstat() for file in walked]
    used_at = max((max(stat.st_mtime, stat.st_atime) for stat in stats), default=path.lstat().st_mtime)
    return _Unit(group, path, sum(stat.st_size for stat in stats), len(stats), used_at)


def _in_use(storage: Storage) -> set[Path]:
    """Scratch copies of this storage's artifacts that somebody works on."""
    if isinstance(storage, LocalStorage):
        return set()
    found = set()
    for kind in storage.list(ARTIFACTS):
        for name in storage.list(f"{ARTIFACTS}/{kind}"):
            stage, _, fingerprint = name.rpartition("-")
            if lease_holder(storage, artifact_lease_relpath(kind, stage, fingerprint)) is not None:
                found.add(ArtifactDir(storage, f"{ARTIFACTS}/{kind}/{name}").scratch)
    return found


def _left_spools(folder: Path, storage: Storage) -> Iterator[_Unit]:
    """Of runs that this storage had and has no more. Those of other storages cannot be judged from here."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        run = Run(storage, path.name.rpartition("-")[0])
        if run.run_id and Spool(storage, run.relpath).dir == path and not run.exists() and run.holder() is None:
            yield _unit(SPOOL, path)


def _delete(units: Sequence[_Unit]) -> str | None:
    for unit in units:
        if os.path.lexists(unit.path) and _unit(unit.group, unit.path).used_at > unit.used_at:
            continue  # used meanwhile
        if unit.path.is_dir():
            shutil.rmtree(unit.path, ignore_errors=True)
        else:
            unit.path.unlink(missing_ok=True)
    return None

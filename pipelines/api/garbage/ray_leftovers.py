"""What Ray left on this machine after its processes were killed: bookkeeping of trainings, and session folders."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from base.files import usage
from pipelines.api.garbage.found import Garbage, Limits, Thing, What, age_s, is_old
from pipelines.cluster import session_folder
from pipelines.stages.train.ray_folder import is_left, ray_train_folders

_ANSWERS_S = 1.0
_STARTING_S = 3600.0  # a session that is being started has no process yet that names it


def ray_leftovers(limits: Limits) -> Iterator[Thing]:
    """What may go: of this user, old enough, and with no process that uses it."""
    for path in ray_train_folders():
        yield from _things("Ray Train folder", path, limits.older_than_s, is_left, "the process that trained is dead")
    older_than_s = max(limits.older_than_s, _STARTING_S)
    for path in sorted(session_folder().glob("session_2*")):
        yield from _things("Ray session", path, older_than_s, _session_is_dead, "no process of it is left")


def _things(
    what: What, path: Path, older_than_s: float, is_dead: Callable[[Path], bool], reason: str
) -> Iterator[Thing]:
    try:
        if path.is_symlink() or path.lstat().st_uid != os.getuid() or not is_dead(path):
            return
        room = usage(path)
    except OSError:  # gone meanwhile, or not ours to read
        return
    if is_old(room, older_than_s):
        garbage = Garbage(
            what=what,
            path=str(path),
            size_bytes=room.size_bytes,
            num_files=room.num_files,
            age_s=age_s(room),
            reason=reason,
        )
        yield Thing(garbage, partial(_delete, path, is_dead))


def _session_is_dead(session: Path) -> bool:
    """No process here names it, and nobody listens on its sockets: not in another container either."""
    for process in psutil.process_iter(["cmdline"]):
        if any(session.name in word for word in process.info["cmdline"] or ()):
            return False
    return not any(map(_listens, (session / "sockets").glob("*")))


def _listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_ANSWERS_S)
            client.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return path.is_socket()  # somebody is there who does not take us in
    return True


def _delete(path: Path, is_dead: Callable[[Path], bool]) -> str | None:
    if not path.exists():
        return None
    if not is_dead(path):
        return "a process uses it by now"
    shutil.rmtree(path, ignore_errors=True)
    latest = path.parent / "session_latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)
    return None

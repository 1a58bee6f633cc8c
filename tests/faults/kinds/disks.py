"""Disks that are full: a file system of its own under what a stage writes, which shrinks to what is in it."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from pathlib import Path

from tests.faults.kinds.fault import Fault
from tests.faults.world import World

_ROOMY = "512m"


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    probe = Path("/mnt")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", probe], capture_output=True).returncode:
        return False
    subprocess.run(["umount", "-l", probe], check=True)
    return True


def _disk(world: World, part: str) -> Path:
    return Path(world.storage.url) / part


def _mount(world: World, part: str) -> None:
    folder = _disk(world, part)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_ROOMY}", "tmpfs", folder], check=True)
    world.on_end.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)


def _resize(world: World, part: str, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", _disk(world, part)], check=True)


def _fill(world: World, part: str) -> None:
    """Full from now on; for good, or for some seconds."""
    for _ in range(20):  # it may grow while we look
        used = subprocess.run(["df", "-k", "--output=used", _disk(world, part)], capture_output=True, text=True)
        size = f"{max(4, int(used.stdout.split()[-1]))}k"
        if not subprocess.run(["mount", "-o", f"remount,size={size}", _disk(world, part)]).returncode:
            break
    if world.rng.random() < 0.5:
        seconds = world.rng.uniform(1.0, 6.0)
        world.notes.append(f"for {seconds:.0f} s")
        time.sleep(seconds)
        _resize(world, part, _ROOMY)


def _make_room(world: World, part: str) -> None:
    _resize(world, part, _ROOMY)


def _full(name: str, part: str, *stages: str) -> Fault:
    actions = {"inject": _fill, "prepare": _mount, "lift": _make_room}
    bound = {action: partial(function, part=part) for action, function in actions.items()}
    where = {"stages": stages} if stages else {}
    return Fault(name, **bound, places=("local",), **where)  # type: ignore[arg-type]


FAULTS = (
    _full("full-checkpoint", "artifacts/train", "train"),
    _full("full-slice", "artifacts/tokenize", "tokens"),
    _full("full-journal", "runs"),
    _full("full-storage", ""),
)

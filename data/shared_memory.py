"""Keeps the shared memory of mosaicml-streaming apart between attempts, and clears what killed ones left.

The library numbers its segments 0, 1, ... on a machine and takes the first free number, so two runs starting together
take the same one, and a run killed with SIGKILL leaves segments that confuse the next. Here each attempt draws a random
number to start from, and its segments are registered by a lock file that the kernel releases when the owner dies.
"""

from __future__ import annotations

import _posixshmem  # type: ignore[import-not-found]  # shared_memory itself must map a segment to remove it
import atexit
import contextlib
import fcntl
import getpass
import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from streaming.base import constant
from streaming.base.shared import prefix

_PREFIX_DIGITS = 11  # with the library's longest name, 31 characters: the most that macOS allows
_NODE_STRIDE = 16  # numbers kept for each node, since two nodes of a test cluster may be one machine


class Namespace:
    """The segment numbers of one attempt on one machine, held until `release`, or until the process dies.

    Made by every worker at the same time; the workers agree on the number through torch.distributed.
    Args:
        registry: folder on this machine where open namespaces are registered; by default one of this user's in the
            system's temporary directory.
    """

    def __init__(self, rank: int, world_size: int, local_world_size: int, registry: Path | None = None) -> None:
        self._registry = registry or Path(tempfile.gettempdir()) / f"bmojo-streaming-{getpass.getuser()}"
        self.first = _agreed_token(world_size) + rank // local_world_size * _NODE_STRIDE
        self._lock: int | None = None
        if rank % local_world_size == 0:
            self._registry.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_stale(self._registry)
            self._lock = _hold(self._registry / f"{self.first}.lock")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Data sets made inside take their segments from this namespace."""
        original = prefix._each_prefix_int
        prefix._each_prefix_int = lambda: count(self.first)
        try:
            yield
        finally:
            prefix._each_prefix_int = original

    def release(self) -> None:
        """Remove what is left of the segments, and the registration."""
        if self._lock is not None:
            _remove_segments(self.first)
            (self._registry / f"{self.first}.lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def close_segments(dataset: Any) -> None:
    """Detach a StreamingDataset from its segments now, instead of when the process ends; its creator removes them."""
    arrays = [dataset._shared_barrier._arr, dataset._shard_states, dataset._shard_access_times]
    arrays += [dataset._next_epoch.arr, dataset._cache_usage.arr]
    segments = [dataset._locals_shm, *(array.shm for array in arrays)]
    if hasattr(dataset, "_resume_shm"):
        segments.append(dataset._resume_shm)
    for segment in segments:
        atexit.unregister(segment.cleanup)
        segment.cleanup()


def remove_stale(registry: Path) -> list[int]:
    """Remove segments of registered namespaces whose owner is dead. Returns their first numbers."""
    removed = []
    for file in registry.glob("*.lock"):
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # released, or removed by another start
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_segments(int(file.stem))
            file.unlink(missing_ok=True)
            removed.append(int(file.stem))
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(descriptor)
    return removed


def _remove_segments(first: int) -> None:
    lock_names = (constant.BARRIER_FILELOCK, constant.CACHE_FILELOCK)
    for number in range(first, first + _NODE_STRIDE):
        for name in constant.SHM_TO_CLEAN:
            with contextlib.suppress(FileNotFoundError):
                _posixshmem.shm_unlink(f"/{number:06}_{name}")
        for name in lock_names:
            Path(tempfile.gettempdir(), f"{number:06}_{name}").unlink(missing_ok=True)


def _agreed_token(world_size: int) -> int:
    """A random number of _PREFIX_DIGITS digits, the same in every worker.

    Raises: RuntimeError: there are other workers, but torch.distributed is not initialised to ask them.
    """
    lowest = 10 ** (_PREFIX_DIGITS - 1)
    token = [lowest + int.from_bytes(os.urandom(6), "little") % (8 * lowest)]
    if world_size > 1:
        if not dist.is_initialized():
            raise RuntimeError(
                f"WORLD_SIZE={world_size}, but torch.distributed is not initialised: call init_process_group first."
            )
        dist.broadcast_object_list(token, src=0)
    return token[0]


def _hold(file: Path) -> int:
    """Create and lock a file; the lock lasts until the descriptor is closed or the process ends."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if file.exists() and file.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # another start took it for stale before it was locked

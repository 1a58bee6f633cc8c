"""Checkpoints written beside training: a step waits for the copy of this rank's pieces, everything else follows.

Each rank copies its pieces into host memory that is used again, pinned beside a GPU. A thread then writes them, hashes
them on the way, and publishes the files. The ranks meet over a process group of their own, so that training's
collectives and these never wait for one another. When all have written, rank 0 completes the checkpoint and deletes
those that are not kept.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import device
from pipelines.stages.train.checkpoint import Kept, TrainingState
from pipelines.stages.train.digests import added, digests_of
from pipelines.stages.train.guards.pulse import patiently
from pipelines.stages.train.pieces import Piece
from pipelines.storage.artifact import ArtifactDir

# A rank whose store is slow is no rank that has gone: whose process ends, closes its connections.
_TIMEOUT = timedelta(days=1)

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


class Saver:
    """Writes checkpoints of one training, one at a time. Making one is a collective."""

    def __init__(
        self, artifact: ArtifactDir, kept: Kept, device: torch.device, before_complete: Callable[[], object]
    ) -> None:
        """Args: before_complete: called on rank 0, in the thread, before a checkpoint counts as complete."""
        self._artifact, self._kept, self._before_complete = artifact, kept, before_complete
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        self._group = group
        self._copies = _HostCopies(device)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.saved_step: int | None = None
        """Step of the newest checkpoint that is complete."""
        self.write_s = 0.0
        """Seconds that the last write took, beside training."""
        self._has_warned = False

    def prepare(self, pieces: Mapping[str, Piece]) -> None:
        """Take the host memory for copies of such pieces now, so that no checkpoint waits for it."""
        self._copies.take(pieces)

    def save(self, state: TrainingState, pieces: Mapping[str, Piece], rng: Mapping[str, torch.Tensor]) -> None:
        """Begin to write a checkpoint, and return when it no longer needs the tensors. A collective.

        Waits for the write before.
        Args: pieces: this rank's; over all ranks each element of a named tensor once.
        Raises: what the write before raised, on any rank.
        """
        self._wait_for_the_one_before()
        copies = self._copies.of(pieces)
        self._thread = threading.Thread(target=self._run, args=(state, copies, rng), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises: what a write that has ended raised, on any rank. Does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way, if there is one. Raises: what it raised, on any rank."""
        if self._thread is not None:
            with patiently("waits until a checkpoint is written"):
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the write under way end, so that nothing writes when the next attempt reads."""
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            logger.warning("The checkpoint under way was not written either: %s", error)
        finally:
            self._copies.release()

    def _wait_for_the_one_before(self) -> None:
        is_under_way = self._thread is not None and self._thread.is_alive()
        start = time.perf_counter()
        self.wait()
        if is_under_way and not self._has_warned and dist.get_rank() == 0:
            self._has_warned = True
            logger.warning(
                "Training waited %.1f s for the checkpoint before to be written, which takes %.1f s. Make them less "
                "often (checkpoint_every_steps, checkpoint_every_s), or write to faster storage.",
                time.perf_counter() - start, self.write_s,
            )  # fmt: skip

    def _run(self, state: TrainingState, pieces: Mapping[str, Piece], rng: Mapping[str, torch.Tensor]) -> None:
        start = time.perf_counter()
        try:
            self._write(state, pieces, rng)
        except Exception as error:  # which `wait` raises in the training's own thread
            self._error = error
        self.write_s = time.perf_counter() - start

    def _write(self, state: TrainingState, pieces: Mapping[str, Piece], rng: Mapping[str, torch.Tensor]) -> None:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        self._together(lambda: checkpoints.clear(self._artifact, state.step) if rank == 0 else None)
        written = self._together(
            lambda: (
                checkpoints.write_rank_files(self._artifact, state.step, rank, num_ranks, pieces, rng),
                digests_of(pieces),
            )
        )
        entries = {name: entry for of_rank, _ in written for name, entry in of_rank.items()}
        whole = state.model_copy(update={"digests": added(digests for _, digests in written)})
        self._together(lambda: self._finish(whole, entries) if rank == 0 else None)
        self.saved_step = state.step

    def _finish(self, state: TrainingState, entries: Mapping[str, checkpoints.FileEntry]) -> None:
        self._before_complete()
        checkpoints.complete(self._artifact, state, entries)
        checkpoints.prune(self._artifact, state.step, self._kept)

    def _together(self, work: Callable[[], Found]) -> list[Found]:
        """Do this on every rank, and give all results to all; an error of one is an error of all."""
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # which all ranks raise below
            error = raised
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (result, _sendable(error)), self._group)
        if error is not None:
            raise error
        errors = [other for _, other in of_ranks if other is not None]
        if errors:
            raise errors[0]
        return [found for found, _ in of_ranks]


class _HostCopies:
    """Copies of pieces in host memory that is used again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0)

    def take(self, pieces: Mapping[str, Piece]) -> None:
        """Have room for as much as these."""
        needed = sum(piece.values.numel() for piece in pieces.values())
        if self._memory.numel() != needed:
            self.release()
            self._memory = device.host_memory(self._device, needed)

    def release(self) -> None:
        """Give the memory back."""
        device.release_host_memory(self._device, self._memory)
        self._memory = torch.empty(0)

    def of(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Copy them; the ones before are overwritten."""
        self.take(pieces)
        copies, offset = {}, 0
        for key, piece in pieces.items():
            target = self._memory.narrow(0, offset, piece.values.numel())
            target.copy_(piece.values, non_blocking=True)
            copies[key] = Piece(piece.start, target)
            offset += piece.values.numel()
        device.synchronize(self._device)
        return copies


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one of its words where another process could not be given it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

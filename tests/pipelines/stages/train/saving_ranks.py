"""Processes that save checkpoints together, until one of them meets with a fault."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bmojo.tensor_file import TensorFile
from pipelines.stages.train import device
from pipelines.stages.train.checkpoint import Kept, TrainingState
from pipelines.stages.train.pieces import Piece, even_shares
from pipelines.stages.train.saving import Saver
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.train import forked

NUM_RANKS = 2
NUMEL = 100_001


def values_at(step: int) -> torch.Tensor:
    """The one tensor, `param/w`."""
    return torch.arange(NUMEL, dtype=torch.float32) + step


def state_at(step: int) -> TrainingState:
    return TrainingState(
        step=step, num_tokens=0, num_samples=0, optimizer_steps=step, num_workers=NUM_RANKS, data={}, train_loss=1.0,
        initial_valid_loss=None, train_time_s=1.0, history={}, versions={},
    )  # fmt: skip


def save_together(folder: Path, faults: Sequence[str]) -> tuple[list[Any], list[int | None]]:
    """Save a checkpoint for each fault, which meets rank 1 ("" for none), at steps 1, 2, ...

    Returns: what each rank wrote down, None for one that did not come to it, and the ranks' exit codes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = forked.context().Process
    ranks = [start(target=_rank, args=(rank, port, folder, faults)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    reports = [folder / f"rank-{rank}.json" for rank in range(NUM_RANKS)]
    return [json.loads(report.read_text()) if report.exists() else None for report in reports], [
        process.exitcode for process in ranks
    ]


def _rank(rank: int, port: int, folder: Path, faults: Sequence[str]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    saver = Saver(ArtifactDir.at(folder / "train-0"), Kept(10), device.CPU, lambda: None)
    found: list[Any] = []
    for step, fault in enumerate(faults, 1):
        _meet(fault if rank == 1 else "")
        start, numel = even_shares({"w": NUMEL}, rank, NUM_RANKS)["w"]
        piece = Piece(start, values_at(step)[start:][:numel])
        try:
            saver.save(state_at(step), {"param/w": piece}, {"torch": torch.zeros(4, dtype=torch.uint8)})
            saver.wait()
        except OSError as error:
            found.append([type(error).__name__, error.errno, error.filename])
        except RuntimeError:
            found.append("the other rank is gone")
        else:
            found.append(saver.saved_step)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group with a dead member is not taken down in order


def _meet(fault: str) -> None:
    """Have what follows fail in this way."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if fault == "disk" else hard, hard))
    if fault == "kill":
        TensorFile.close = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]  # it ends

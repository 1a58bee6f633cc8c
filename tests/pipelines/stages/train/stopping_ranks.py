"""Two processes that step together until they agree to stop."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipelines.stages.train.agreement import Agreement
from pipelines.tracking.request import Request
from tests.pipelines.stages.train import forked

NUM_RANKS = 2
ASKED_AT_STEP = 7  # whoever asks from then on hears that it should stop


class Stopped(NamedTuple):
    """The step after which a rank stopped, and how often it had asked."""

    step: int
    questions: int


def stop_together(paces_s: Sequence[float], folder: Path) -> list[list[Stopped]]:
    """How the ranks stop, by rank, for each time that a step may take."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked.run(_rank, (port, paces_s, folder), NUM_RANKS)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    return [[Stopped(*rank[index]) for rank in ranks] for index in range(len(paces_s))]


def _rank(rank: int, port: int, paces_s: Sequence[float], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    found = [_stop(step_s * (1 + rank / 4)) for step_s in paces_s]  # one rank is slower than the other
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _stop(step_s: float) -> Stopped:
    step = questions = 0

    def was_asked() -> Request:
        nonlocal questions
        questions += 1
        return Request.STOP if step >= ASKED_AT_STEP else Request.NONE

    agreement = Agreement(was_asked, lambda: False, None, torch.device("cpu"))
    has_stopped = False
    while not has_stopped:
        time.sleep(step_s)
        dist.all_reduce(torch.zeros(1))  # as a step of training does
        step += 1
        has_stopped = bool(agreement.reached())
    return Stopped(step, questions)

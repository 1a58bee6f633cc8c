"""Processes that train, forked from one that has imported torch and our modules: importing is most of what a start
takes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import torch.multiprocessing as mp

_START_METHOD = "forkserver"


def context() -> ForkServerContext:
    """As multiprocessing's `spawn`, but quick."""
    found = multiprocessing.get_context(_START_METHOD)
    found.set_forkserver_preload(["tests.pipelines.stages.train.trainer_contract"])
    return found


def run(work: Callable[..., None], arguments: tuple[object, ...], num_ranks: int) -> None:
    """`work(rank, *arguments)` in each of the processes, to their end. Raises: what one of them raised."""
    context()
    mp.start_processes(work, arguments, nprocs=num_ranks, start_method=_START_METHOD)

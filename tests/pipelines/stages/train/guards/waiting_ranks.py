"""Two processes that step together, of which one can be stopped."""

from __future__ import annotations

import os
import socket
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import torch
import torch.distributed as dist

from pipelines.stages.train.guards.hang import Heard
from pipelines.stages.train.guards.pulse import Sign, beat, signs_of_life
from tests.pipelines.stages.train import forked

NUM_RANKS = 2
EVERY_S = 0.1


class PipeListener:
    """A Listener that writes into a pipe."""

    def __init__(self, pipe: Connection, wants_stacks: Event) -> None:
        self._pipe, self._wants_stacks = pipe, wants_stacks

    def tell(self, sign: Sign) -> bool:
        self._pipe.send(sign)
        return self._wants_stacks.is_set()

    def tell_stacks(self, rank: int, text: str) -> None:
        self._pipe.send(text)


class Ranks:
    """The processes, and what they told."""

    def __init__(self) -> None:
        context = forked.context()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.wants_stacks = context.Event()
        pipes = [context.Pipe(duplex=False) for _ in range(NUM_RANKS)]
        self._readers = [reader for reader, _ in pipes]
        self._last: dict[int, tuple[Sign, float]] = {}
        self.stacks: dict[int, str] = {}
        self.processes = [
            context.Process(target=_rank, args=(rank, port, pipes[rank][1], self.wants_stacks), daemon=True)
            for rank in range(NUM_RANKS)
        ]
        for process in self.processes:
            process.start()

    def heard(self) -> list[Heard]:
        """What the ranks told last."""
        for rank, reader in enumerate(self._readers):
            while reader.poll():
                told = reader.recv()
                if isinstance(told, str):
                    self.stacks[rank] = told
                else:
                    self._last[rank] = (told, time.monotonic())
        return [Heard(sign, time.monotonic() - at) for _, (sign, at) in sorted(self._last.items())]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _rank(rank: int, port: int, pipe: Connection, wants_stacks: Event) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    with signs_of_life(PipeListener(pipe, wants_stacks), rank, EVERY_S):
        step = 0
        while True:
            step += 1
            beat("adds up", step)
            dist.all_reduce(torch.zeros(1))
            time.sleep(0.01)

"""Replicas of the same tensors on several ranks, compared by digests: a bit that flipped in one memory is found."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipelines.errors import InfrastructureError
from pipelines.stages.train.digests import digest
from pipelines.stages.train.guards.incidents import Incidents
from pipelines.stages.train.pieces import Piece
from pipelines.stages.train.trainer import Trainer

_MOST_SHOWN = 5


class Difference(NamedTuple):
    """A named tensor of which some ranks have other bits than most."""

    key: str
    ranks: tuple[int, ...]  # those with other bits; all, if there is no majority
    hosts: tuple[str, ...]  # of these ranks

    def __str__(self) -> str:
        where = ", ".join(f"{rank} ({host})" for rank, host in zip(self.ranks, self.hosts, strict=True))
        return f"{self.key} on rank {where}"


def differing_replicas(trainer: Trainer) -> list[Difference]:
    """The tensors that ranks hold whole and not alike; the same answer on every rank. A collective.

    One pass over the memory, one all-gather of 8 bytes per tensor, one wait for the device.
    """
    replicas, world_size = trainer.replicas(), dist.get_world_size()
    if world_size == 1 or not replicas:
        return []
    own = torch.stack([digest(Piece(0, value.detach().reshape(-1))) for value in replicas.values()])
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own)
    by_rank = torch.stack(gathered).tolist()
    by_key = dict(zip(replicas, zip(*by_rank, strict=True), strict=True))
    differing = {key: digests for key, digests in by_key.items() if len(set(digests)) > 1}
    if not differing:
        return []
    hosts = [""] * world_size
    dist.all_gather_object(hosts, platform.node())
    return [_difference(key, digests, hosts) for key, digests in differing.items()]


def refuse_differing_replicas(trainer: Trainer, incidents: Incidents, step: int, saved_step: int | None) -> None:
    """End an attempt in which ranks compute with other weights. A collective.

    Before every save too: a checkpoint is always of replicas that were alike.
    Raises: InfrastructureError: names what differs and where; the next attempt resumes from the last checkpoint.
    """
    found = differing_replicas(trainer)
    if not found:
        return
    shown = "; ".join(map(str, found[:_MOST_SHOWN]))
    if len(found) > _MOST_SHOWN:
        shown += f"; and {len(found) - _MOST_SHOWN} more"
    source = "the first step" if saved_step is None else f"the checkpoint of step {saved_step}"
    message = (
        f"Replicas differ after step {step}: {shown}. A bit has flipped in a memory, or machines of several kinds "
        f"round otherwise. Training goes on from {source}, whose replicas were alike. If it happens again, take the "
        "host out."
    )
    incidents.add("replicas", step, message, tensors=[each._asdict() for each in found])
    raise InfrastructureError(message)


def _difference(key: str, digests: Sequence[int], hosts: list[str]) -> Difference:
    (common, votes), *_ = Counter(digests).most_common()
    has_majority = 2 * votes > len(digests)
    ranks = tuple(rank for rank, each in enumerate(digests) if not has_majority or each != common)
    return Difference(key, ranks, tuple(hosts[rank] for rank in ranks))

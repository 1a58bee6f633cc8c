"""Functions of whole matrices whose elements are spread over the ranks: send the pieces to one rank, and back.

Each matrix has one owner. Two all-to-alls move every element once to it and once back, whatever the sharding. A matrix
that some rank holds whole stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

MOST_AT_ONCE = 1 << 26  # elements of all ranks together that are under way at a time


class Extent(NamedTuple):
    """A piece of a flattened matrix."""

    start: int
    numel: int


class Exchange:
    """Who holds which piece of each matrix, and who computes with the whole of it. Making one is a collective."""

    def __init__(self, shapes: Mapping[str, torch.Size], held: Mapping[str, Extent]) -> None:
        """shapes: of all matrices, the same on every rank. held: what this rank has."""
        self._shapes = shapes
        self._rank, num_ranks = dist.get_rank(), dist.get_world_size()
        self._held: list[dict[str, Extent]] = [{} for _ in range(num_ranks)]
        dist.all_gather_object(self._held, dict(held))
        self._owner: dict[str, int] = {}  # of matrices that no rank holds whole
        loads = [0.0] * num_ranks
        for name in sorted(shapes, key=lambda name: -_work(shapes[name])):
            if not any(name in of_rank and of_rank[name].numel == shapes[name].numel() for of_rank in self._held):
                owner = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
                self._owner[name], loads[owner] = owner, loads[owner] + _work(shapes[name])

    def apply(
        self, function: Callable[[torch.Tensor], torch.Tensor], pieces: Mapping[str, torch.Tensor], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """This rank's pieces of function(matrix) for each of `names`. A collective if a matrix is split.

        Args: pieces: 1-D, what this rank has of the matrices. names: the same on every rank.
        """
        whole = [name for name in names if name not in self._owner and name in pieces]
        results = {name: function(pieces[name].view(self._shapes[name])).reshape(-1) for name in whole}
        for some in self._portions([name for name in names if name in self._owner]):
            results |= self._apply_split(function, pieces, some)
        return results

    def _portions(self, names: Sequence[str]) -> Iterator[list[str]]:
        portion: list[str] = []
        for name in names:
            if portion and sum(self._shapes[one].numel() for one in [*portion, name]) > MOST_AT_ONCE:
                yield portion
                portion = []
            portion.append(name)
        if portion:
            yield portion

    def _apply_split(
        self, function: Callable[[torch.Tensor], torch.Tensor], pieces: Mapping[str, torch.Tensor], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        ranks = range(len(self._held))
        sent = [[name for name in names if self._owner[name] == rank and name in pieces] for rank in ranks]
        own = [name for name in names if self._owner[name] == self._rank]
        received = [[name for name in own if name in self._held[rank]] for rank in ranks]
        like = next(iter(pieces.values())) if pieces else torch.empty(0)
        mine = [self._held[self._rank][name].numel for group in sent for name in group]
        theirs = [self._held[rank][name].numel for rank in ranks for name in received[rank]]
        sizes_sent = [sum(self._held[self._rank][name].numel for name in group) for group in sent]
        sizes_received = [sum(self._held[rank][name].numel for name in received[rank]) for rank in ranks]

        buffer = torch.cat([pieces[name] for group in sent for name in group] or [like[:0]])
        gathered = like.new_empty(sum(sizes_received))
        dist.all_to_all_single(gathered, buffer, sizes_received, sizes_sent)
        wholes = {name: like.new_empty(self._shapes[name].numel()) for name in own}
        places = [(name, self._held[rank][name]) for rank in ranks for name in received[rank]]
        for (name, extent), piece in zip(places, gathered.split(theirs) if theirs else [], strict=True):
            wholes[name][extent.start : extent.start + extent.numel] = piece

        done = {name: function(whole.view(self._shapes[name])).reshape(-1) for name, whole in wholes.items()}
        back = torch.cat([done[name].narrow(0, *extent) for name, extent in places] or [like[:0]])
        returned = torch.empty_like(buffer)
        dist.all_to_all_single(returned, back, sizes_sent, sizes_received)
        order = [name for group in sent for name in group]
        return dict(zip(order, returned.split(mine) if mine else [], strict=True))


def _work(shape: torch.Size) -> float:
    """Of a product of the matrix with itself."""
    return float(shape.numel()) * min(shape) if math.prod(shape) else 0.0

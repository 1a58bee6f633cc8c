"""Named tensors of a training in pieces: who answers for which part, and how parts become whole again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

Read = Callable[[str, int, int], torch.Tensor]
"""(key, start, number of elements) -> that stretch of the flattened tensor: 1-D, float32, on the CPU."""


class Piece(NamedTuple):
    """A part of a named tensor."""

    start: int  # where it begins in the flattened tensor
    values: torch.Tensor  # 1-D float32; may share memory with the trainer's own


class Stretch(NamedTuple):
    """Where a part lies in a flattened tensor."""

    start: int
    numel: int


def even_shares(sizes: Mapping[str, int], rank: int, num_ranks: int) -> dict[str, Stretch]:
    """A rank's part of tensors that every rank holds whole: all of them in a row, cut into equal lengths.

    Args: sizes: elements by name, the same on every rank.
    Returns: one stretch for each tensor of which the rank has something.
    """
    total = sum(sizes.values())
    first, end = total * rank // num_ranks, total * (rank + 1) // num_ranks
    shares, offset = {}, 0
    for name, size in sizes.items():
        start, stop = max(first - offset, 0), min(end - offset, size)
        if start < stop:
            shares[name] = Stretch(start, stop - start)
        offset += size
    return shares


def gather(piece: Piece | None, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """The whole tensor, to the last bit, from the pieces of all ranks. A collective.

    Args: piece: this rank's; None where it has none. device: for the result.
    """
    # Bits are added as integers: each has one contributor, and -0.0 stays what it is.
    bits = torch.zeros(shape.numel(), dtype=torch.int32, device=device)
    if piece is not None:
        bits.narrow(0, piece.start, piece.values.numel()).copy_(piece.values.to(device).view(torch.int32))
    dist.all_reduce(bits)
    return bits.view(torch.float32).view(shape)

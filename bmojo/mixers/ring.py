"""Ring buffers [b, r, ...] of the last r positions: position i lives in slot i mod r."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def zeros(batch_size: int, size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty ring [b, r, h, p]; heads lie ahead of slots in memory, so that attention reads it without a copy."""
    return torch.zeros(batch_size, heads, size, head_dim, dtype=dtype, device=device).transpose(1, 2)


def in_order(ring_br: Tensor, next_position: int) -> Tensor:
    """The r rows before `next_position`, oldest first (rows of negative positions hold nothing)."""
    return ring_br.roll(-(next_position % ring_br.shape[1]), 1)


def refill(ring_br: Tensor, ordered_bs: Tensor, next_position: int) -> None:
    """Set the ring, in place, to the last r of the rows that end just before `next_position`."""
    size = ring_br.shape[1]
    ring_br.copy_(ordered_bs[:, -size:].roll(next_position % size, 1))


def write(rings: Sequence[Tensor], new: Sequence[Tensor], position_b: Tensor) -> None:
    """Put one row into each ring, at each batch element's own position, in place."""
    batch = torch.arange(position_b.shape[0], device=position_b.device)
    slot_of_size = {size: position_b % size for size in {ring_br.shape[1] for ring_br in rings}}
    for ring_br, new_b in zip(rings, new, strict=True):
        ring_br[batch, slot_of_size[ring_br.shape[1]]] = new_b.to(ring_br.dtype)

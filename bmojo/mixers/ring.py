"""Ring buffers [b, r, ...] of the last r positions: position i lives in slot i mod r."""

from __future__ import annotations

import torch
from torch import Tensor


def zeros(batch_size: int, size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty ring [b, r, h, p]; heads lie ahead of slots in memory, so that attention reads it without a copy."""
    return torch.zeros(batch_size, heads, size, head_dim, dtype=dtype, device=device).transpose(1, 2)


def resized(ring_br: Tensor, size: int) -> Tensor:
    """A larger ring with the same slots, and empty ones behind them."""
    b, num_slots, heads, head_dim = ring_br.shape
    larger = zeros(b, size, heads, head_dim, ring_br.dtype, ring_br.device)
    larger[:, :num_slots] = ring_br
    return larger


def in_order(ring_br: Tensor, next_position: int) -> Tensor:
    """The r rows before `next_position`, oldest first (rows of negative positions hold nothing)."""
    return ring_br.roll(-(next_position % ring_br.shape[1]), 1)


def refill(ring_br: Tensor, ordered_bs: Tensor, next_position: int) -> None:
    """Set the ring, in place, to the last r of the rows that end just before `next_position`; fewer rows are all."""
    size = ring_br.shape[1]
    if ordered_bs.shape[1] < size:
        ring_br[:, :next_position] = ordered_bs
    else:
        ring_br.copy_(ordered_bs[:, -size:].roll(next_position % size, 1))

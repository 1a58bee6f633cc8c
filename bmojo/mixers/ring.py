"""Ring buffers [b, r, ...] of the last r positions: position i lives in slot i mod r."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEG_INF = float("-inf")


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


def write(ring_br: Tensor, position_b: Tensor, value_b: Tensor) -> None:
    """Put one row at each batch element's own position, in place."""
    rows_b = torch.arange(ring_br.shape[0], device=ring_br.device)
    ring_br[rows_b, position_b % ring_br.shape[1]] = value_b.to(ring_br.dtype)


def ages(ring_br: Tensor, position_b: Tensor) -> Tensor:
    """How long before `position_b`, the newest row, each slot was written, [b, r]."""
    size = ring_br.shape[1]
    return (position_b[:, None] - torch.arange(size, device=ring_br.device)) % size


def attend(sets: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """One query a row, one softmax over several sets (q_bhp, k_bshp, v_bshp, allowed_bs). Returns [b, h, p]."""
    scores, values = [], []
    q = sets[0][0]
    b, h, p = q.shape
    kv_heads = sets[0][1].shape[2]
    for q_bhp, k_bshp, v_bshp, allowed_bs in sets:
        q_bkgp = (q_bhp * p**-0.5).view(b, kv_heads, h // kv_heads, p)
        score_bkgs = q_bkgp @ k_bshp.permute(0, 2, 3, 1).to(q.dtype)
        scores.append(score_bkgs.masked_fill(~allowed_bs[:, None, None], NEG_INF))
        values.append(v_bshp.transpose(1, 2).to(q.dtype))
    precise = torch.promote_types(q.dtype, torch.float32)
    probs = F.softmax(torch.cat(scores, -1), -1, dtype=precise).to(q.dtype).split([s.shape[-1] for s in scores], -1)
    out = probs[0] @ values[0]
    for prob, value in zip(probs[1:], values[1:], strict=True):
        out = out + prob @ value
    return out.reshape(b, h, p)

"""Plain-torch decoding step: scores of all sets side by side, one softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEG_INF = float("-inf")


def memory_attention_step_torch(
    q_bhp: Tensor,
    k_brhp: Tensor,
    v_brhp: Tensor,
    fading: tuple[Tensor, Tensor] | None = None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    window_size: int,
    position_b: Tensor,
) -> Tensor:
    """See kernels.memory_attention.memory_attention_step."""
    sets = [(q_bhp, k_brhp, v_brhp, in_ring(k_brhp, position_b, 0, window_size))]
    if fading is not None:
        sets.append((q_bhp, *fading, in_ring(fading[0], position_b, window_size, window_size)))
    if eidetic is not None:
        sets.append((*eidetic[:3], eidetic[3] >= 0))
    return attend(sets)


def in_ring(ring_br: Tensor, position_b: Tensor, age: int, window_size: int) -> Tensor:
    """Which slots of a ring hold one of the positions that `position_b` reads, [b, r]."""
    size = ring_br.shape[1]
    age_br = (position_b[:, None] - torch.arange(size, device=ring_br.device)) % size
    return (age_br >= age) & (age_br < age + window_size) & (age_br <= position_b[:, None])


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

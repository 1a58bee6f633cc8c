"""The meaning of memory attention: dense scores over every key, masks from the definition, one softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_attention_reference(
    q_bthp: Tensor,
    k_bshp: Tensor,
    v_bshp: Tensor,
    fading: tuple[Tensor, Tensor] | None = None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    window_size: int,
    chunk_size: int | None = None,
    doc_ids_bt: Tensor | None = None,
    num_past: int = 0,
) -> Tensor:
    """See kernels.memory_attention. Time and memory grow with t x s: for small inputs."""
    num_queries, h = q_bthp.shape[1:3]
    t = torch.arange(num_queries, device=q_bthp.device)
    scores, values = [], []

    def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> None:
        """k, v: [b, s, kv heads, p], or [b, t, s, kv heads, p] where each query has keys of its own."""
        groups = h // k.shape[-2]
        k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
        per_query = "bthp,bthsp->bhts" if k.dim() == 5 else "bthp,bhsp->bhts"
        score = torch.einsum(per_query, q, k.transpose(-3, -2)) * q.shape[-1] ** -0.5
        scores.append(score.masked_fill(~allowed, float("-inf")))
        values.append(v if v.dim() == 5 else v[:, None].expand(-1, num_queries, -1, -1, -1))

    def local(k: Tensor, v: Tensor, age: int) -> None:
        position = torch.arange(k.shape[1], device=k.device) - (k.shape[1] - num_queries) - age
        distance = t[:, None] - position[None, :]
        allowed = (distance >= age) & (distance < age + window_size) & (position >= -num_past)
        allowed = allowed[None, None]
        if doc_ids_bt is not None:
            allowed = allowed & (doc_ids_bt[:, None, :, None] == doc_ids_bt[:, None, None, position.clamp_min(0)])
        attend(q_bthp, k, v, allowed)

    local(k_bshp, v_bshp, 0)
    if fading is not None:
        local(*fading, window_size)
    if eidetic is not None:
        assert chunk_size is not None
        q, k, v, index_bjm = eidetic
        index_btm = index_bjm[:, t // chunk_size]
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        rows = index_btm.clamp_min(0)
        allowed = (index_btm >= 0)[:, None]
        if doc_ids_bt is not None:
            of_chunk_bt = doc_ids_bt[:, t // chunk_size * chunk_size]
            allowed = allowed & (doc_ids_bt == of_chunk_bt)[:, None, :, None]
        attend(q, k[batch, rows], v[batch, rows], allowed)
    probs = torch.softmax(torch.cat(scores, -1), -1)
    return torch.einsum("bhts,btshp->bthp", probs, torch.cat(values, 2))

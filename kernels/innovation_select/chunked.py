"""The eidetic sets of one pass: a scan over chunks that merges what has left the window into the M kept so far."""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def innovation_select_chunked(
    rank_bs: Tensor,
    position_bs: Tensor,
    *,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    num_eidetic: int,
    doc_ids_bs: Tensor | None = None,
    start: int = 0,
    num_slots: int = 0,
) -> Tensor:
    """See kernels.innovation_select. Static shapes: each merge is one stable sort of at most M + C candidates."""
    batch, num_rows = rank_bs.shape
    device = rank_bs.device
    first_position = start - (num_rows - num_slots - num_queries)  # of the first row that is not a slot
    kept_bm = torch.arange(num_slots, device=device).expand(batch, -1)
    kept_bm = torch.where(position_bs[:, :num_slots] >= 0, kept_bm, -1)
    if num_slots < num_eidetic:
        kept_bm = torch.cat([kept_bm, kept_bm.new_full((batch, num_eidetic - num_slots), -1)], 1)
    sets = []
    done = first_position  # positions before this one have been merged
    if start % chunk_size == 0:
        done = max(first_position, start - chunk_size - window_size + 1)
    for boundary in range(start, start + num_queries, chunk_size):
        if boundary % chunk_size == 0:
            last = boundary - window_size + 1
            new_rows = torch.arange(done, max(done, last), device=device) - first_position + num_slots
            done = max(done, last)
            if kept_bm.shape[1] and (new_rows.numel() or doc_ids_bs is not None):
                candidates_bc = torch.cat([kept_bm, new_rows.expand(batch, -1)], 1)
                rows_bc = candidates_bc.clamp_min(0)
                valid_bc = (candidates_bc >= 0) & (position_bs.gather(1, rows_bc) >= 0)
                if doc_ids_bs is not None:
                    here = boundary - first_position + num_slots
                    valid_bc = valid_bc & (doc_ids_bs.gather(1, rows_bc) == doc_ids_bs[:, here : here + 1])
                order_bm = stable_best(rank_bs.gather(1, rows_bc), valid_bc, num_eidetic)
                kept_bm = torch.where(valid_bc, candidates_bc, -1).gather(1, order_bm)
        sets.append(kept_bm)
    return torch.stack(sets, 1)


def stable_best(rank_bc: Tensor, valid_bc: Tensor, num_eidetic: int) -> Tensor:
    """See kernels.innovation_select.keep_best."""
    rank_bc = rank_bc.masked_fill(~valid_bc, NEG_INF)
    return rank_bc.sort(dim=1, descending=True, stable=True).indices[:, :num_eidetic]

"""The meaning of the eidetic set: for every chunk, rank all candidates anew and keep the best M."""

from __future__ import annotations

import torch
from torch import Tensor


def innovation_select_reference(
    log_innovation_bs: Tensor,
    position_bs: Tensor,
    *,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    num_eidetic: int,
    tau: float | None = None,
    doc_ids_bs: Tensor | None = None,
    start: int = 0,
    num_slots: int = 0,
) -> Tensor:
    """See kernels.innovation_select."""
    batch, num_rows = log_innovation_bs.shape
    sets = torch.full((batch, -(-num_queries // chunk_size), num_eidetic), -1, device=log_innovation_bs.device)
    score, position = log_innovation_bs.tolist(), position_bs.tolist()
    documents = None if doc_ids_bs is None else doc_ids_bs.tolist()
    for b in range(batch):
        for j, boundary in enumerate(range(start, start + num_queries, chunk_size)):
            here = num_rows - num_queries + boundary - start
            ranked = []
            for row in range(num_rows):
                in_slot = row < num_slots
                left_window = boundary % chunk_size == 0 and position[b][row] <= boundary - window_size
                same = documents is None or documents[b][row] == documents[b][here]
                merged_before = position[b][row] <= start - chunk_size - window_size  # if kept, it is in a slot
                candidate = in_slot or (left_window and not merged_before)
                if position[b][row] >= 0 and candidate and same:
                    age = 0.0 if tau is None else (position[b][row] - boundary) / tau
                    ranked.append((-(score[b][row] + age), position[b][row], row))
            rows = [row for _, _, row in sorted(ranked)[:num_eidetic]]
            sets[b, j, : len(rows)] = torch.tensor(rows, dtype=torch.long)
    return sets

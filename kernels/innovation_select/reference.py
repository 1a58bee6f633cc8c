"""The meaning of the eidetic set: a score for every position, and for every chunk the best M of all candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.innovation_select.scores import EPS


def innovation_scores_reference(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None = None, doc_ids_bt: Tensor | None = None
) -> Tensor:
    """See kernels.innovation_select.innovation_scores."""
    y_btd = y_btd.detach().to(torch.promote_types(y_btd.dtype, torch.float32))
    taps = weight_kd.shape[0]
    past_bkd = y_btd.new_zeros(y_btd.shape[0], taps, y_btd.shape[2]) if past_bkd is None else past_bkd
    extended = torch.cat([past_bkd.detach().to(y_btd.dtype), y_btd], 1)
    scores = []
    for i in range(y_btd.shape[1]):
        predicted_bd = torch.zeros_like(y_btd[:, i])
        for lag in range(1, taps + 1):
            earlier_bd = extended[:, taps + i - lag]
            if doc_ids_bt is not None:
                same_b = doc_ids_bt[:, i] == doc_ids_bt[:, i - lag] if i >= lag else torch.zeros_like(doc_ids_bt[:, i])
                earlier_bd = torch.where(same_b.bool()[:, None], earlier_bd, 0)
            predicted_bd = predicted_bd + earlier_bd * weight_kd[lag - 1].to(y_btd.dtype)
        error_b = (y_btd[:, i] - predicted_bd).square().sum(-1)
        scores.append(error_b / (y_btd[:, i].square().sum(-1) + EPS))
    return torch.stack(scores, 1)


def innovation_select_reference(
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
    """See kernels.innovation_select."""
    batch, num_rows = rank_bs.shape
    sets = torch.full((batch, -(-num_queries // chunk_size), num_eidetic), -1, device=rank_bs.device)
    rank, position = rank_bs.tolist(), position_bs.tolist()
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
                    ranked.append((-rank[b][row], position[b][row], row))
            rows = [row for _, _, row in sorted(ranked)[:num_eidetic]]
            sets[b, j, : len(rows)] = torch.tensor(rows, dtype=torch.long)
    return sets

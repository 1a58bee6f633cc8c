"""Plain-torch scores, and the eidetic sets by a scan over chunks that merges what left the window into the M kept."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.innovation_select.reference import EPS, ScoreInputs, SelectInputs, ranks
from kernels.operator import Path

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
NEG_INF = float("-inf")


def _run_scores(inputs: ScoreInputs) -> Tensor:
    """One multiply-add over the whole sequence per tap."""
    y_btd, weight_kd, past_bkd, doc_ids_bt = inputs
    y_btd = y_btd.detach().to(torch.promote_types(y_btd.dtype, torch.float32))
    t, taps = y_btd.shape[1], weight_kd.shape[0]
    weight_kd = weight_kd.to(y_btd.dtype)
    residual_btd = y_btd.clone()
    for lag in range(1, taps + 1):
        earlier = y_btd[:, :-lag]
        if doc_ids_bt is not None:
            earlier = earlier * (doc_ids_bt[:, lag:] == doc_ids_bt[:, :-lag]).to(y_btd.dtype)[..., None]
        residual_btd[:, lag:].addcmul_(earlier, weight_kd[lag - 1], value=-1)
        if past_bkd is not None:
            earlier = past_bkd[:, taps - lag : taps - lag + min(lag, t)].to(y_btd.dtype)
            residual_btd[:, :lag].addcmul_(earlier, weight_kd[lag - 1], value=-1)
    return _square_norm(residual_btd) / (_square_norm(y_btd) + EPS)


def _run_select(inputs: SelectInputs) -> Tensor:
    """Static shapes: each merge is one stable sort of at most M + C candidates."""
    _, position_bs, num_queries, chunk_size, window_size, num_eidetic, tau, doc_ids_bs, start, num_slots = inputs
    rank_bs = ranks(inputs.log_innovation_bs, position_bs, tau)
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
                rank_bc = rank_bs.gather(1, rows_bc)
                valid_bc = valid_bc & (rank_bc > NEG_INF)
                order_bm = stable_best(rank_bc, valid_bc, num_eidetic)
                kept_bm = torch.where(valid_bc, candidates_bc, -1).gather(1, order_bm)
        sets.append(kept_bm)
    return torch.stack(sets, 1)


innovation_scores = Path(_run_scores, tolerance=TOLERANCE)
innovation_select = Path(_run_select)


def stable_best(rank_bc: Tensor, valid_bc: Tensor, num_eidetic: int) -> Tensor:
    """Indices of the best ranks, invalid ones last; ties keep their order."""
    rank_bc = rank_bc.masked_fill(~valid_bc, NEG_INF)
    return rank_bc.sort(dim=1, descending=True, stable=True).indices[:, :num_eidetic]


def _square_norm(x_btd: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_btd, dim=-1).square()

"""Plain-torch innovation scores: one multiply-add over the whole sequence for each tap."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def innovation_scores_shifted(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> Tensor:
    """See kernels.innovation_select.innovation_scores."""
    y_btd = y_btd.detach().to(torch.promote_types(y_btd.dtype, torch.float32))
    residual_btd = y_btd - _predicted(y_btd, weight_kd.to(y_btd.dtype), past_bkd, doc_ids_bt)
    return residual_btd.square().sum(-1) / (y_btd.square().sum(-1) + EPS)


def _predicted(y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None) -> Tensor:
    t, taps = y_btd.shape[1], weight_kd.shape[0]
    past_bkd = y_btd.new_zeros(y_btd.shape[0], taps, y_btd.shape[2]) if past_bkd is None else past_bkd
    extended = torch.cat([past_bkd.to(y_btd.dtype), y_btd], 1)
    yhat_btd = torch.zeros_like(y_btd)
    for lag in range(1, taps + 1):
        earlier = extended[:, taps - lag : taps - lag + t]
        if doc_ids_bt is not None and lag < t:
            same = torch.zeros(doc_ids_bt.shape, dtype=y_btd.dtype, device=y_btd.device)
            same[:, lag:] = (doc_ids_bt[:, lag:] == doc_ids_bt[:, :-lag]).to(y_btd.dtype)
            earlier = earlier * same[..., None]
        yhat_btd = yhat_btd + earlier * weight_kd[lag - 1]
    return yhat_btd

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


def _square_norm(x_btd: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_btd, dim=-1).square()

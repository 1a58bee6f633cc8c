"""The innovation scores' C++ path, for a predictor that is not being trained."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import rows_contiguous
from kernels.innovation_select.scores import EPS


def innovation_scores_cpp(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None
) -> Tensor:
    """See kernels.innovation_select.innovation_scores; no gradient passes.

    Raises: ValueError: shapes that do not go together.
    """
    y_btd = rows_contiguous(y_btd.detach())
    batch, t, channels = y_btd.shape
    taps = weight_kd.shape[0]
    weight_kd = weight_kd.detach().to(y_btd.dtype).expand(taps, channels).contiguous()
    if past_bkd is not None:
        past_bkd = past_bkd.detach().to(y_btd.dtype).contiguous()
        if past_bkd.shape != (batch, taps, channels):
            raise ValueError(f"past_bkd is {tuple(past_bkd.shape)}, not {(batch, taps, channels)}.")
    if doc_ids_bt is not None:
        doc_ids_bt = doc_ids_bt.to(torch.int64).expand(batch, t)
    error_bt = y_btd.new_empty(batch, t)
    library.call("innovation_scores", y_btd.dtype, y_btd, weight_kd, past_bkd, doc_ids_bt, error_bt, EPS)
    return error_bt

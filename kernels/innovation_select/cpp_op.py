"""The C++ path: scores, for a predictor that is not being trained, and the selection."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import require_shapes, rows_contiguous
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


def innovation_select_cpp(
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
    """See kernels.innovation_select. Raises: ValueError: shapes that do not go together."""
    shape = tuple(rank_bs.shape)
    require_shapes(position_bs=(position_bs, shape), doc_ids_bs=(doc_ids_bs, shape))
    position_bs = position_bs.to(torch.int64)
    doc_ids_bs = None if doc_ids_bs is None else doc_ids_bs.to(torch.int64)
    index_bjm = position_bs.new_empty(shape[0], -(-num_queries // chunk_size), max(num_eidetic, num_slots))
    library.call(
        "innovation_select", rank_bs.dtype, rank_bs, position_bs, doc_ids_bs, index_bjm,
        num_queries, chunk_size, window_size, start, num_slots,
    )  # fmt: skip
    return index_bjm

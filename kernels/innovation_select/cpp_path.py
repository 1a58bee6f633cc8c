"""Innovation scores, for a predictor that is not being trained, the selection and the step's scores in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import require_shapes, rows_contiguous
from kernels.innovation_select import torch_step
from kernels.innovation_select.reference import EPS, ScoreInputs, SelectInputs, ranks
from kernels.innovation_select.reference_step import StepInputs
from kernels.operator import Path

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def _refuses_scores(inputs: ScoreInputs) -> str | None:
    trained = torch.is_grad_enabled() and inputs.weight_kd.requires_grad
    return "the predictor is being trained, and the C++ kernel has no backward" if trained else None


def _run_scores(inputs: ScoreInputs) -> Tensor:
    """Raise ValueError if shapes do not go together."""
    _, weight_kd, past_bkd, doc_ids_bt = inputs
    y_btd = rows_contiguous(inputs.y_btd.detach())
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


def _run_select(inputs: SelectInputs) -> Tensor:
    """Raise ValueError if shapes do not go together."""
    _, position_bs, num_queries, chunk_size, window_size, num_eidetic, tau, doc_ids_bs, start, num_slots = inputs
    rank_bs = ranks(inputs.log_innovation_bs, position_bs, tau)
    shape = tuple(rank_bs.shape)
    require_shapes(position_bs=(position_bs, shape), doc_ids_bs=(doc_ids_bs, shape))
    position_bs = position_bs.to(torch.int64)
    doc_ids_bs = None if doc_ids_bs is None else doc_ids_bs.to(torch.int64)
    index_bjm = position_bs.new_empty(shape[0], -(-num_queries // chunk_size), max(num_eidetic, num_slots))
    operands = (rank_bs, position_bs, doc_ids_bs, index_bjm)
    library.call("innovation_select", rank_bs.dtype, *operands, num_queries, chunk_size, window_size, start, num_slots)
    return index_bjm


innovation_scores = Path(_run_scores, _refuses_scores, TOLERANCE)
innovation_select = Path(_run_select)
innovation_step = Path[StepInputs, Tensor](lambda inputs: torch_step.step(inputs, _run_scores), tolerance=TOLERANCE)

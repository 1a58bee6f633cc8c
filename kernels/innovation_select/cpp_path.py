"""Innovation scores, for a predictor that is not being trained, the selection, and a decoding step in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import require_shapes, rows_contiguous
from kernels.innovation_select.reference import EPS, ScoreInputs, SelectInputs, ranks
from kernels.innovation_select.reference_step import LOWEST, StepInputs
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
    weight_kd = _by_channel(weight_kd.to(y_btd.dtype), channels)
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


def _step_refuses(inputs: StepInputs) -> str | None:
    y_bd, _, weight_kd, past, log_e, k, v, slot_k, slot_v, slot_log_e, slot_position, given_b, _, _ = inputs
    if slot_position.dtype != torch.int64:
        return f"positions of {slot_position.dtype}"
    read = [weight_kd, past, log_e, k, v, slot_k, slot_v, slot_log_e, *([] if given_b is None else [given_b])]
    others = {x.dtype for x in read} - {y_bd.dtype}
    if others:
        return f"outputs of {y_bd.dtype}, and tensors of {' and '.join(sorted(map(str, others)))}"
    rows = (past, k, v, slot_k, slot_v)
    return None if all(x.stride(-1) == 1 for x in rows) else "rows that are not contiguous"


def _run_step(inputs: StepInputs) -> Tensor:
    """Raise ValueError if shapes do not go together."""
    y_bd, position_b, weight_kd, past, log_e, k, v, slot_k, slot_v, slot_log_e, slot_position = inputs[:11]
    given_b, chunk_size, tau = inputs[11:]
    (b, channels), taps = y_bd.shape, weight_kd.shape[0]
    rings, slots = (b, log_e.shape[1], *k.shape[2:]), (b, slot_k.shape[1], *k.shape[2:])
    require_shapes(position_b=(position_b, (b,)), past_bkd=(past, (b, taps, channels)), log_e=(log_e, rings[:2]))
    require_shapes(k=(k, rings), v=(v, rings), slot_k=(slot_k, slots), slot_v=(slot_v, slots), given_b=(given_b, (b,)))
    require_shapes(slot_log_e=(slot_log_e, slots[:2]), slot_position=(slot_position, slots[:2]))
    score_b = log_e.new_empty(b)
    operands = (
        rows_contiguous(y_bd.detach()), position_b.to(torch.int64), _by_channel(weight_kd, channels), past, log_e, k, v,
        slot_k, slot_v, slot_log_e, slot_position, given_b, score_b,
    )  # fmt: skip
    library.call("innovation_step", y_bd.dtype, *operands, chunk_size, float(tau or 0), EPS, LOWEST)
    return score_b


def _by_channel(weight_kd: Tensor, channels: int) -> Tensor:
    """Weights of the taps for each channel; what is the same for all is written out."""
    return weight_kd.detach().expand(-1, channels).contiguous()


innovation_scores = Path(_run_scores, _refuses_scores, TOLERANCE)
innovation_select = Path(_run_select)
innovation_step = Path(_run_step, _step_refuses, TOLERANCE)

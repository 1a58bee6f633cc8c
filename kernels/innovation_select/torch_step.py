"""The eidetic memory's decoding step in plain torch: a stable sort of slots and leavers, for every row alike."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.innovation_select.reference import ScoreInputs, ranks
from kernels.innovation_select.reference_step import LOWEST, StepInputs
from kernels.innovation_select.torch_path import NEG_INF, TOLERANCE, innovation_scores, stable_best
from kernels.operator import Path


def _run(inputs: StepInputs) -> Tensor:
    """No look at positions on a GPU: the host would wait for it."""
    y_bd, position_b, weight_kd, past_bkd, log_e_br = inputs[:5]
    score_b = inputs.given_b
    if score_b is None:
        score_b = innovation_scores.run(ScoreInputs(y_bd[:, None], weight_kd, past_bkd))[:, 0].clamp_min(LOWEST).log()
    past_bkd.copy_(torch.cat([past_bkd[:, 1:], y_bd[:, None].to(past_bkd.dtype)], 1))
    batch = torch.arange(position_b.shape[0], device=position_b.device)
    log_e_br[batch, position_b % log_e_br.shape[1]] = score_b.to(log_e_br.dtype)
    begins_b = position_b % inputs.chunk_size == 0
    if not position_b.is_cpu or bool(begins_b.any()):
        _merge(inputs, begins_b)
    return score_b


def _merge(inputs: StepInputs, begins_b: Tensor) -> None:
    _, position_b, _, _, log_e, k, v, slot_k, slot_v, slot_log_e, slot_position, _, chunk_size, tau = inputs
    size, num_slots, device = log_e.shape[1], slot_k.shape[1], position_b.device
    left_bc = position_b[:, None] - size + 1 + torch.arange(chunk_size, device=device)
    batch = torch.arange(position_b.shape[0], device=device)[:, None]
    at_bc = left_bc % size
    position_bc = torch.cat([slot_position, left_bc], 1)
    log_e_bc = torch.cat([slot_log_e, log_e[batch, at_bc]], 1)
    position_bc = torch.where(log_e_bc > NEG_INF, position_bc, -1)
    best_bm = stable_best(ranks(log_e_bc, position_bc, tau), position_bc >= 0, num_slots)
    best_bm = torch.where(begins_b[:, None], best_bm, torch.arange(num_slots, device=device))
    slot_k.copy_(torch.cat([slot_k, k[batch, at_bc]], 1)[batch, best_bm])
    slot_v.copy_(torch.cat([slot_v, v[batch, at_bc]], 1)[batch, best_bm])
    slot_log_e.copy_(log_e_bc.gather(1, best_bm))
    slot_position.copy_(position_bc.gather(1, best_bm).clamp_min(-1))


innovation_step = Path(_run, tolerance=TOLERANCE)

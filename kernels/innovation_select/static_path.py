"""Scores by shifted sums, and the eidetic sets by counting who beats whom: no sort, no scan over chunks, no index.

A position's place in a set is the number of candidates that rank before it. Who ranks before whom is the same for all
chunks, so the places in all sets are one product of 0/1 matrices: candidates of each chunk times that relation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.innovation_select.reference import EPS, ScoreInputs, SelectInputs
from kernels.operator import Path
from kernels.static import one_hot, padded, same_document, shifted, unbound

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
SPLIT = float((1 << 12) + 1)  # cuts a float32 into two of 12 bits


def _run_scores(inputs: ScoreInputs) -> Tensor:
    """One multiply-add over the whole sequence per tap."""
    y_btd, weight_kd, past_bkd, doc_ids_bt = inputs
    y_btd = y_btd.detach().to(torch.promote_types(y_btd.dtype, torch.float32))
    given = y_btd if past_bkd is None else torch.cat([past_bkd.detach().to(y_btd.dtype), y_btd], 1)
    residual = given
    for lag, weight_d in enumerate(unbound(weight_kd.to(y_btd.dtype), 0), 1):
        earlier = shifted(given, lag)
        if doc_ids_bt is not None:
            earlier = earlier * same_document(doc_ids_bt, lag, y_btd.dtype)
        residual = residual - earlier * weight_d
    if past_bkd is not None:
        residual = padded(residual, -past_bkd.shape[1], 0)
    return residual.square().sum(-1) / (y_btd.square().sum(-1) + EPS)


def _run_select(inputs: SelectInputs) -> Tensor:
    log_e_bs, position_bs, num_queries, chunk_size, _, num_eidetic, tau, _, start, _ = inputs
    device, num_chunks, num_rows = log_e_bs.device, -(-num_queries // chunk_size), _num_rows(inputs)
    log_e_bs, position_bs = log_e_bs.detach()[:, :num_rows], position_bs[:, :num_rows]
    boundary_j = torch.arange(num_chunks, device=device) * chunk_size + start
    candidate_bjs = _candidates(inputs, position_bs, boundary_j) & (log_e_bs > float("-inf"))[:, None]
    beats_bsk = _beats(log_e_bs, position_bs, tau).to(torch.float32)
    place_bjs = torch.matmul(candidate_bjs.to(torch.float32), beats_bsk.transpose(1, 2))
    place_m = torch.arange(num_eidetic, device=device).to(torch.float32)
    there_bjms = candidate_bjs[:, :, None] & (place_bjs[:, :, None] == place_m[:, None])
    row_s = torch.arange(1, num_rows + 1, device=device).to(torch.float32)
    return (there_bjms.to(torch.float32) * row_s).sum(-1).to(torch.int64) - 1


def _num_rows(inputs: SelectInputs) -> int:
    """The first rows, of which alone some leave a window."""
    boundaries = range(inputs.start, inputs.start + inputs.num_queries, inputs.chunk_size)
    num_rows = inputs.position_bs.shape[1]
    first_position = inputs.start - (num_rows - inputs.num_slots - inputs.num_queries)
    leaving = max(0, boundaries[-1] - inputs.window_size - first_position + 1)
    return min(inputs.num_slots + leaving, num_rows)


def _candidates(inputs: SelectInputs, position_bs: Tensor, boundary_j: Tensor) -> Tensor:
    """[b, j, s]: the slots, and what has left the window since they were chosen, of the document at the boundary."""
    num_rows, device, docs = position_bs.shape[1], position_bs.device, inputs.doc_ids_bs
    start, chunk_size, window_size = inputs.start, inputs.chunk_size, inputs.window_size
    there_bjs = (torch.arange(num_rows, device=device) < inputs.num_slots).expand(position_bs.shape[0], 1, -1)
    if start % chunk_size == 0:  # else there is one boundary, at which nothing leaves the window
        left_bjs = position_bs[:, None] <= (boundary_j - window_size)[:, None]
        merged_b1s = (position_bs <= start - chunk_size - window_size)[:, None]  # if it was kept, it is in a slot
        there_bjs = there_bjs | (left_bjs & ~merged_b1s)
    there_bjs = there_bjs & (position_bs >= 0)[:, None]
    if docs is None:
        return there_bjs
    row_j = boundary_j + (docs.shape[1] - inputs.num_queries - start)
    here_bj = (one_hot(row_j, docs.shape[1], docs.dtype) * docs[:, None]).sum(-1)
    return there_bjs & (docs[:, None, :num_rows] == here_bj[..., None])


def _beats(log_e_bs: Tensor, position_bs: Tensor, tau: float | None) -> Tensor:
    """[b, s, k]: whether row k ranks before row s: by `ranks`, of equal ones the earlier."""
    earlier_bsk = position_bs[:, None, :] < position_bs[:, :, None]
    if tau is None:
        one_bsk, other_bsk = log_e_bs[:, None, :], log_e_bs[:, :, None]
        return (one_bsk > other_bsk) | ((one_bsk == other_bsk) & earlier_bsk)
    ahead_bsk = _ahead(log_e_bs, position_bs, tau)
    return (ahead_bsk > 0) | ((ahead_bsk == 0) & earlier_bsk)


def _ahead(log_e_bs: Tensor, position_bs: Tensor, tau: float) -> Tensor:
    """tau (log e_k - log e_s) + position_k - position_s in pairs of float32, whose sums are exact but for the last."""
    high, low = _product(log_e_bs, tau)
    by_score, lost = _sum(high[:, None, :], -high[:, :, None])
    by_position = (position_bs[:, None, :] - position_bs[:, :, None]).to(torch.float32)
    total, lost_again = _sum(by_score, by_position)
    return total + (lost + lost_again + (low[:, None, :] - low[:, :, None]))


def _sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y rounded, and what the rounding lost (D. Knuth, TAOCP 2, 4.2.2)."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


def _product(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """x * factor rounded, and what the rounding lost (T. J. Dekker, 1971); factor: a float32."""
    product = x * factor
    cut = x * SPLIT
    high = cut - (cut - x)
    low = x - high
    factor_high = _rounded(factor, 12)
    factor_low = factor - factor_high
    return product, low * factor_low - (((product - high * factor_high) - low * factor_high) - high * factor_low)


def _rounded(x: float, num_bits: int) -> float:
    """x with so many bits. Without a tensor, whose value a compiler would wait for."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, num_bits)), exponent - num_bits)


def _refuses(inputs: SelectInputs) -> str | None:
    """What the places and comparisons in float32 cannot hold."""
    if inputs.tau is None:
        return None
    if inputs.log_innovation_bs.dtype != torch.float32:
        return f"the static innovation_select with forgetting takes float32, not {inputs.log_innovation_bs.dtype}"
    if _rounded(inputs.tau, 24) != inputs.tau:
        return f"the static innovation_select takes a tau that is a float32, not {inputs.tau}"
    return None


innovation_scores = Path(_run_scores, tolerance=TOLERANCE)
innovation_select = Path(_run_select, _refuses)

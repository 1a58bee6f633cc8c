"""One decoding step of the eidetic memory: its inputs, and its meaning row by row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.innovation_select.reference import ScoreInputs, innovation_scores, ranks
from kernels.operator import Path, random_tensors

LOWEST = 1e-30  # keeps the logarithm finite if a prediction is perfect


class StepInputs(NamedTuple):
    """Score a token per row and hold it; where a chunk begins, merge what left the window into the slots. All in place;
    no gradient passes.

    A chunk begins where chunk_size [C] divides the position. Then the slots take the best M, by `ranks`, of what they
    hold and of the C positions up to position - W, where R = W + C is the size of the rings. Ties keep their order:
    what was kept, best first, then what is new, by position.

    Args:
        y_bd: outputs of the SSM.  position_b: of each row's token.
        weight_kd: as in ScoreInputs.
        past_bkd: the K outputs before, oldest first; y_bd is added, and the oldest goes.
        log_e_br: ring of scores, position i in slot i mod R; this token's is added.
        k_brhp, v_brhp: rings of keys, not rotated, and values; they are read only.
        slot_k_bmhp, slot_v_bmhp, slot_log_e_bm, slot_position_bm: the slots, best first; position -1: empty.
        given_b: scores of the tokens, -inf: never kept; None: log max(e_i, LOWEST) with e_i as in ScoreInputs.
        tau: forgetting time in tokens; None: none.
    Returns: the score of each row's token.
    """

    y_bd: Tensor
    position_b: Tensor
    weight_kd: Tensor
    past_bkd: Tensor
    log_e_br: Tensor
    k_brhp: Tensor
    v_brhp: Tensor
    slot_k_bmhp: Tensor
    slot_v_bmhp: Tensor
    slot_log_e_bm: Tensor
    slot_position_bm: Tensor
    given_b: Tensor | None
    chunk_size: int
    tau: float | None


def _run(inputs: StepInputs) -> Tensor:
    y_bd, position_b, weight_kd, past_bkd, log_e_br, k, v, slot_k, slot_v, slot_log_e, slot_position = inputs[:11]
    score_b = inputs.given_b
    if score_b is None:
        score_b = innovation_scores.run(ScoreInputs(y_bd[:, None], weight_kd, past_bkd))[:, 0].clamp_min(LOWEST).log()
    past_bkd.copy_(torch.cat([past_bkd[:, 1:], y_bd[:, None].to(past_bkd.dtype)], 1))
    (size, num_slots), num_new = (log_e_br.shape[1], slot_k.shape[1]), inputs.chunk_size
    for b, position in enumerate(position_b.tolist()):
        log_e_br[b, position % size] = score_b[b]
        if position % num_new:
            continue
        kept = [(slot_k[b, m], slot_v[b, m], slot_log_e[b, m], slot_position[b, m]) for m in range(num_slots)]
        for left in range(max(0, position - size + 1), position - size + num_new + 1):
            at = left % size
            kept.append((k[b, at], v[b, at], log_e_br[b, at], torch.tensor(left)))
        full = [one for one in kept if one[3] >= 0 and one[2] > float("-inf")]
        full.sort(key=lambda one: -ranks(one[2], one[3], inputs.tau).item())  # stable
        best = [tuple(x.clone() for x in one) for one in full[:num_slots]]
        slot_position[b] = -1
        for m, (one_k, one_v, one_log_e, one_position) in enumerate(best):
            slot_k[b, m], slot_v[b, m], slot_log_e[b, m], slot_position[b, m] = one_k, one_v, one_log_e, one_position
    return score_b


innovation_step = Path(_run)


def example() -> StepInputs:
    """Two rows, of which one begins a chunk."""
    return made([16, 17], (5, 3), (2, 4), 3, with_given=False, tau=7.0)


def made(
    positions: list[int],
    sizes: tuple[int, int],
    heads: tuple[int, int],
    num_slots: int,
    *,
    with_given: bool,
    tau: float | None,
) -> StepInputs:
    """Random rings, and slots of which the last is empty.

    Args: sizes: window and chunk [W, C].  heads: heads and their channels [h, p].
    """
    b, (window_size, chunk_size), channels, taps = len(positions), sizes, 6, 3
    size = window_size + chunk_size
    y, weight, past, log_e, given, k, v, slot_k, slot_v, slot_log_e = random_tensors(
        (b, channels), (taps, channels), (b, taps, channels), (b, size), (b,), (b, size, *heads), (b, size, *heads),
        (b, num_slots, *heads), (b, num_slots, *heads), (b, num_slots),
    )  # fmt: skip
    slot_log_e = slot_log_e.sort(1, descending=True).values
    slot_position = torch.arange(num_slots).expand(b, -1).clone()
    if tau is not None:
        slot_log_e -= slot_position / tau  # best first by rank too
    slot_position[:, -1] = -1
    return StepInputs(
        y, torch.tensor(positions), weight, past, log_e, k, v, slot_k, slot_v, slot_log_e, slot_position,
        given if with_given else None, chunk_size, tau,
    )  # fmt: skip

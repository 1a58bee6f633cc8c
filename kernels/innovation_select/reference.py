"""The eidetic set's inputs and meaning: a score per position, and per chunk the best M of all candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operator import Path

EPS = 1e-6


class ScoreInputs(NamedTuple):
    """e_i = |y_i - yhat_i|^2 / (|y_i|^2 + eps),  yhat_i = sum_{j=1..K} weight_j * y_{i-j}, within a document.

    Args:
        y_btd: outputs to be predicted; no gradient passes to them.
        weight_kd: weights of the K outputs before, nearest first, per channel or [K, 1] for all alike.
        past_bkd: the K outputs before the first; zeros if None. Passes no gradient. Not with doc_ids_bt.
        doc_ids_bt: document of each position; None: one.
    Returns: float32 [b, t] (float64 for float64 outputs), with a gradient to weight_kd.
    Raises: ValueError: past_bkd and doc_ids_bt together.
    """

    y_btd: Tensor
    weight_kd: Tensor
    past_bkd: Tensor | None = None
    doc_ids_bt: Tensor | None = None


class SelectInputs(NamedTuple):
    """The eidetic set of every chunk of queries: S_j = the M highest-ranked positions i <= jC - W of the document that
    holds position jC, ranked by `ranks`, ties to the earlier position (docs/model.md). No gradient passes.

    Rows are, in this order: `num_slots` already kept, positions just before `start`, and `num_queries` from `start` on.

    Args:
        log_innovation_bs: log e_i of each row, or another score; -inf: the row is never kept.
        position_bs: position of each row, consecutive after the slots; negative marks a row that holds none.
        num_queries: rows that are queries; they are the last ones.
        chunk_size: positions between updates [C]. Updates happen at its multiples.
        window_size: positions still in the window are no candidates [W]; at least chunk_size.
        num_eidetic: size of a set [M]; at least num_slots.
        tau: forgetting time in tokens; None: old and new innovations weigh the same.
        doc_ids_bs: document of each row. None: all rows are one document.
        start: position of the first query: a multiple of chunk_size, or else all queries are in one chunk.
        num_slots: rows at the front that hold the set in force before `start`, best first.
    Returns: int64 [b, chunks, m]: rows, best first, -1 if the set has fewer than M.
    Raises: ValueError: queries from within a chunk reach over its end.
    """

    log_innovation_bs: Tensor
    position_bs: Tensor
    num_queries: int
    chunk_size: int
    window_size: int
    num_eidetic: int
    tau: float | None = None
    doc_ids_bs: Tensor | None = None
    start: int = 0
    num_slots: int = 0


def check_scores(inputs: ScoreInputs) -> None:
    """Raise ValueError if there are both a past and documents."""
    if inputs.past_bkd is not None and inputs.doc_ids_bt is not None:
        raise ValueError("innovation_scores continues one document: give past_bkd or doc_ids_bt, not both.")


def check_select(inputs: SelectInputs) -> None:
    """Raise ValueError if queries from within a chunk reach over its end."""
    start, chunk_size, num_queries = inputs.start, inputs.chunk_size, inputs.num_queries
    if start % chunk_size and start % chunk_size + num_queries > chunk_size:
        raise ValueError(
            f"{num_queries} queries from position {start} cross a chunk boundary (chunk_size={chunk_size}); "
            "split them there."
        )


def ranks(log_innovation: Tensor, position: Tensor, tau: float | None) -> Tensor:
    """Ranks of positions: log e_i, or with forgetting tau log e_i + i in float64: the order of log e_i + i / tau.

    The sum has one value per token, whatever the chunk or path. For float32 scores the product is exact (tau of up to
    29 bits), so scores that tie exactly have equal ranks; README.md. No gradient passes.
    """
    if tau is None:
        return log_innovation.detach()
    return log_innovation.detach().to(torch.float64) * tau + position


def _run_scores(inputs: ScoreInputs) -> Tensor:
    y_btd, weight_kd, past_bkd, doc_ids_bt = inputs
    y_btd = y_btd.detach().to(torch.promote_types(y_btd.dtype, torch.float32))
    taps = weight_kd.shape[0]
    past_bkd = y_btd.new_zeros(y_btd.shape[0], taps, y_btd.shape[2]) if past_bkd is None else past_bkd
    extended = torch.cat([past_bkd.detach().to(y_btd.dtype), y_btd], 1)
    scores = []
    for i in range(y_btd.shape[1]):
        predicted_bd = torch.zeros_like(y_btd[:, i])
        for lag in range(1, taps + 1):
            earlier_bd = extended[:, taps + i - lag]
            if doc_ids_bt is not None:
                same_b = doc_ids_bt[:, i] == doc_ids_bt[:, i - lag] if i >= lag else torch.zeros_like(doc_ids_bt[:, i])
                earlier_bd = torch.where(same_b.bool()[:, None], earlier_bd, 0)
            predicted_bd = predicted_bd + earlier_bd * weight_kd[lag - 1].to(y_btd.dtype)
        error_b = (y_btd[:, i] - predicted_bd).square().sum(-1)
        scores.append(error_b / (y_btd[:, i].square().sum(-1) + EPS))
    return torch.stack(scores, 1)


def _run_select(inputs: SelectInputs) -> Tensor:
    _, position_bs, num_queries, chunk_size, window_size, num_eidetic, tau, doc_ids_bs, start, num_slots = inputs
    rank_bs = ranks(inputs.log_innovation_bs, position_bs, tau)
    batch, num_rows = rank_bs.shape
    sets = torch.full((batch, -(-num_queries // chunk_size), num_eidetic), -1, device=rank_bs.device)
    rank, position = rank_bs.tolist(), position_bs.tolist()
    documents = None if doc_ids_bs is None else doc_ids_bs.tolist()
    for b in range(batch):
        for j, boundary in enumerate(range(start, start + num_queries, chunk_size)):
            here = num_rows - num_queries + boundary - start
            ranked = []
            for row in range(num_rows):
                in_slot = row < num_slots
                left_window = boundary % chunk_size == 0 and position[b][row] <= boundary - window_size
                same = documents is None or documents[b][row] == documents[b][here]
                merged_before = position[b][row] <= start - chunk_size - window_size  # if kept, it is in a slot
                candidate = in_slot or (left_window and not merged_before)
                if position[b][row] >= 0 and candidate and same and rank[b][row] > float("-inf"):
                    ranked.append((-rank[b][row], position[b][row], row))
            rows = [row for _, _, row in sorted(ranked)[:num_eidetic]]
            sets[b, j, : len(rows)] = torch.tensor(rows, dtype=torch.long)
    return sets


innovation_scores = Path(_run_scores)
innovation_select = Path(_run_select)


def example_scores() -> ScoreInputs:
    """A small call with documents."""
    generator = torch.Generator().manual_seed(0)
    y_btd, weight_kd = torch.randn(2, 13, 6, generator=generator), torch.randn(3, 6, generator=generator)
    return ScoreInputs(y_btd, weight_kd, doc_ids_bt=torch.tensor([[0] * 13, [0] * 5 + [1] * 8]))


def example_select() -> SelectInputs:
    """A small call with forgetting and documents."""
    log_e_bs = torch.randn(2, 13, generator=torch.Generator().manual_seed(0))
    docs = torch.tensor([[0] * 13, [0] * 5 + [1] * 8])
    return SelectInputs(log_e_bs, torch.arange(13).expand(2, -1), 13, 3, 4, 2, tau=5.0, doc_ids_bs=docs)

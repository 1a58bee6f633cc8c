"""Which positions each chunk keeps verbatim: the running top M by innovation. Derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.innovation_select.chunked import innovation_select_chunked, stable_best
from kernels.innovation_select.cpp_op import innovation_scores_cpp, innovation_select_cpp
from kernels.innovation_select.reference import innovation_scores_reference, innovation_select_reference
from kernels.innovation_select.scores import innovation_scores_shifted

__all__ = [
    "innovation_scores",
    "innovation_scores_reference",
    "innovation_select",
    "innovation_select_reference",
    "keep_best",
    "ranks",
]


def innovation_scores(
    y_btd: Tensor, weight_kd: Tensor, past_bkd: Tensor | None = None, doc_ids_bt: Tensor | None = None
) -> Tensor:
    """e_i = |y_i - yhat_i|^2 / (|y_i|^2 + eps),  yhat_i = sum_{j=1..K} weight_j * y_{i-j}, within a document.

    Args:
        y_btd: outputs to be predicted; no gradient passes to them.
        weight_kd: weights of the K outputs before, nearest first, of each channel or [K, 1] for all alike.
        past_bkd: the K outputs before the first; zeros where None. Passes no gradient. Not with doc_ids_bt.
        doc_ids_bt: document of each position; None: one.
    Returns: float32 [b, t] (float64 for float64 outputs), with a gradient to weight_kd.
    Raises: ValueError: past_bkd and doc_ids_bt together.
    """
    if past_bkd is not None and doc_ids_bt is not None:
        raise ValueError("innovation_scores continues one document: give past_bkd or doc_ids_bt, not both.")
    path = dispatch.chosen(y_btd)
    if path == "triton":
        from kernels.innovation_select.triton_scores import innovation_scores_triton

        return innovation_scores_triton(y_btd, weight_kd, past_bkd, doc_ids_bt)
    if path == "cpp" and not (torch.is_grad_enabled() and weight_kd.requires_grad):  # the kernel has no backward
        return innovation_scores_cpp(y_btd, weight_kd, past_bkd, doc_ids_bt)
    score = innovation_scores_reference if path == "reference" else innovation_scores_shifted
    return score(y_btd, weight_kd, past_bkd, doc_ids_bt)


def innovation_select(
    log_innovation_bs: Tensor,
    position_bs: Tensor,
    *,
    num_queries: int,
    chunk_size: int,
    window_size: int,
    num_eidetic: int,
    tau: float | None = None,
    doc_ids_bs: Tensor | None = None,
    start: int = 0,
    num_slots: int = 0,
) -> Tensor:
    """The eidetic set of every chunk of queries: S_j = the M highest-ranked positions i <= jC - W of the document that
    holds position jC, ranked by `ranks`, ties to the earlier position (docs/model.md). No gradient passes.

    Rows are, in this order: `num_slots` already kept, positions just before `start`, and `num_queries` from `start` on.

    Args:
        log_innovation_bs: log e_i of each row; finite.
        position_bs: position of each row, consecutive after the slots; negative marks a row that holds none.
        num_queries: rows that are queries; they are the last ones.
        chunk_size: positions between updates [C]. Updates happen at its multiples.
        window_size: positions still in the window are no candidates [W]; at least chunk_size.
        num_eidetic: size of a set [M]; at least num_slots.
        tau: forgetting time in tokens; None: old and new innovations weigh the same.
        doc_ids_bs: document of each row. None: all rows are one document.
        start: position of the first query: a multiple of chunk_size, or else all queries are in one chunk.
        num_slots: rows at the front that hold the set in force before `start`, best first.
    Returns: int64 [b, chunks, m]: rows, best first, -1 where the set has fewer than M.
    Raises: ValueError: queries from within a chunk reach over its end.
    """
    if start % chunk_size and start % chunk_size + num_queries > chunk_size:
        raise ValueError(
            f"{num_queries} queries from position {start} cross a chunk boundary (chunk_size={chunk_size}); "
            "split them there."
        )
    rank_bs = ranks(log_innovation_bs, position_bs, tau)
    path = dispatch.chosen(rank_bs)
    if path == "triton":
        from kernels.innovation_select.triton_op import innovation_select_triton as select
    elif path == "reference":
        select = innovation_select_reference
    elif path == "cpp":
        select = innovation_select_cpp
    else:
        select = innovation_select_chunked
    return select(
        rank_bs, position_bs, num_queries=num_queries, chunk_size=chunk_size, window_size=window_size,
        num_eidetic=num_eidetic, doc_ids_bs=doc_ids_bs, start=start, num_slots=num_slots,
    )  # fmt: skip


def keep_best(
    log_innovation_bc: Tensor, position_bc: Tensor, valid_bc: Tensor, num_eidetic: int, tau: float | None
) -> Tensor:
    """Indices [b, m] of the best candidates by `ranks`, best first, invalid ones last.

    Candidates that tie keep their order: what was kept, best first, then what is new, by position.
    """
    rank_bc = ranks(log_innovation_bc, position_bc, tau)
    if dispatch.chosen(rank_bc) == "triton":
        from kernels.innovation_select.triton_op import keep_best_triton

        return keep_best_triton(rank_bc, valid_bc, num_eidetic)
    return stable_best(rank_bc, valid_bc, num_eidetic)


def ranks(log_innovation: Tensor, position: Tensor, tau: float | None) -> Tensor:
    """What positions are compared by: log e_i, or with forgetting tau log e_i + i in float64, which orders them as
    log e_i + i / tau does. No gradient passes.

    The sum has one value per token, whatever the chunk or path. For float32 scores the product is exact (tau of up to
    29 bits), so scores that tie exactly have equal ranks; README.md.
    """
    if tau is None:
        return log_innovation.detach()
    return log_innovation.detach().to(torch.float64) * tau + position

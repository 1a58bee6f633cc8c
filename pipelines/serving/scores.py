"""Log-probabilities of tokens, as the API reports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenScore(NamedTuple):
    """Natural log-probability of a token, and the likeliest tokens in its place with theirs, best first."""

    logprob: float
    top: list[tuple[int, float]]


def token_scores(logits_tv: Tensor, tokens: Sequence[int], num_top: int, num_token_ids: int) -> list[TokenScore]:
    """Of one token per row, at temperature 1, before any cut. num_token_ids: ids past it only pad the vocabulary."""
    log_p_tv = logits_tv[:, :num_token_ids].float().log_softmax(-1)
    tokens_t = torch.tensor(tokens, dtype=torch.long, device=logits_tv.device)
    drawn = log_p_tv.gather(1, tokens_t[:, None])[:, 0].tolist()
    best = log_p_tv.topk(min(num_top, num_token_ids))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [list(zip(ids, values, strict=True)) for ids, values in pairs]
    return [TokenScore(logprob, top) for logprob, top in zip(drawn, tops, strict=True)]

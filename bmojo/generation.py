"""Sampling text from a model, token by token, with a state of constant size."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from bmojo.model import BMojoLM

MAX_SEED = 2**63 - 1


def generate(
    model: BMojoLM,
    prompt_bt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    valid_bt: Tensor | None = None,
    num_token_ids: int | None = None,
) -> Iterator[Tensor]:
    """Yield tokens_b, int64, as they are sampled.

    Args:
        prompt_bt: at least one row, of at least one token.
        valid_bt: False where a row is padded, on the left or on the right.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p: sample among the k likeliest, or the fewest whose probabilities sum to at least p.
        seed: rows draw from generators seeded with seed, row by row, so a row alone draws as row 0 of a batch does.
        num_token_ids: ids of the tokenizer; those past it, which pad the vocabulary to a round size, are never drawn.
        stop_tokens: after one of them a row yields it again until all rows have stopped, which ends generation.
    Raises: ValueError: an option out of its range.
    """
    _check(temperature, top_k, top_p, max_new_tokens, seed)
    if 0 in prompt_bt.shape:
        raise ValueError(
            f"the prompt is {tuple(prompt_bt.shape)} (rows, tokens); it must have a row, and a token in each. A new "
            "document begins with the end-of-document token."
        )
    logits_bv, state = model.prefill(prompt_bt, valid_bt=valid_bt)
    rngs = [torch.Generator(device=prompt_bt.device).manual_seed(seed + row) for row in range(prompt_bt.shape[0])]
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=prompt_bt.device)
    stopped_b = torch.zeros(prompt_bt.shape[0], dtype=torch.bool, device=prompt_bt.device)
    previous_b = None
    for count in range(max_new_tokens):
        if num_token_ids is not None:
            logits_bv = logits_bv.clone()
            logits_bv[:, num_token_ids:] = float("-inf")
        tokens_b = sample(logits_bv, temperature, top_k, top_p, rngs)
        if previous_b is not None:
            tokens_b = torch.where(stopped_b, previous_b, tokens_b)
        stopped_b = stopped_b | torch.isin(tokens_b, stops)
        yield tokens_b
        if bool(stopped_b.all()) or count + 1 == max_new_tokens:
            return
        previous_b = tokens_b
        logits_bv, state = model.step(tokens_b, state)


def sample(
    logits_bv: Tensor, temperature: float, top_k: int | None, top_p: float | None, rngs: list[torch.Generator]
) -> Tensor:
    """One token per row from softmax(logits / temperature), cut to the likeliest; each row draws from its generator."""
    if temperature == 0:
        return logits_bv.argmax(-1)
    logits_bv, order_bv = (logits_bv.float() / temperature).sort(-1, descending=True)
    probs_bv = logits_bv.softmax(-1)
    if top_k is not None:
        probs_bv[:, top_k:] = 0
    if top_p is not None:
        mass_before_bv = probs_bv.cumsum(-1) - probs_bv
        probs_bv = probs_bv.masked_fill(mass_before_bv >= top_p * probs_bv.sum(-1, keepdim=True), 0)
    picks = [torch.multinomial(probs, 1, generator=rng) for probs, rng in zip(probs_bv, rngs, strict=True)]
    return order_bv.gather(1, torch.stack(picks))[:, 0]


def _check(temperature: float, top_k: int | None, top_p: float | None, max_new_tokens: int, seed: int) -> None:
    for name, value, fine, expected in (
        ("temperature", temperature, 0 <= temperature < math.inf, ">= 0 and finite"),
        ("top_k", top_k, top_k is None or top_k >= 1, ">= 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, ">= 1"),
        ("seed", seed, 0 <= seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
    ):
        if not fine:
            raise ValueError(f"{name} is {value}; it must be {expected}.")

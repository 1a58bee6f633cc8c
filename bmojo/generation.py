"""Sampling text from a model, token by token, with a state of constant size."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from bmojo.decoding import Decoder
from bmojo.model import BMojoLM
from bmojo.state import DecodingState

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

    On a GPU nothing here waits for it but the prefill and the end: a token can be yielded before it is computed.

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
    yield from continue_from(
        model, logits_bv, state, max_new_tokens, temperature, top_k, top_p, seed, stop_tokens, num_token_ids,
        max_tokens=prompt_bt.shape[1] + max_new_tokens,
    )  # fmt: skip


def continue_from(
    model: BMojoLM,
    logits_bv: Tensor,
    state: DecodingState,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    num_token_ids: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[Tensor]:
    """As `generate`, after a prompt that was read into a state, which is updated in place.

    Args: logits_bv: for the next token.  max_tokens: see Decoder.
    """
    _check(temperature, top_k, top_p, max_new_tokens, seed)
    num_rows, device = state.batch_size, state.position_b.device
    decoder = Decoder(model, state, max_tokens)
    rngs = [torch.Generator(device=device).manual_seed(seed + row) for row in range(num_rows)]
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=device)
    stopped_b = torch.zeros(num_rows, dtype=torch.bool, device=device)
    previous_b, ended = None, None
    for count in range(max_new_tokens):
        if num_token_ids is not None:
            logits_bv = logits_bv.clone()
            logits_bv[:, num_token_ids:] = float("-inf")
        tokens_b = sample(logits_bv, temperature, top_k, top_p, rngs)
        if previous_b is not None:
            tokens_b = torch.where(stopped_b, previous_b, tokens_b)
        if ended is not None and ended.value():  # a token late: the GPU is busy with this one, which is one too many
            return
        if stop_tokens:
            stopped_b = stopped_b | (tokens_b[:, None] == stops).any(1)
            ended = HostFlag(stopped_b.all())
        yield tokens_b
        if count + 1 == max_new_tokens or (ended is not None and ended.is_known() and ended.value()):
            return
        previous_b = tokens_b
        logits_bv = decoder.step(tokens_b)


class HostFlag:
    """A boolean of a GPU on its way to the host, which need not wait for what the GPU is given to do meanwhile."""

    def __init__(self, flag: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._flag = flag
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))

    def is_known(self) -> bool:
        """Whether `value` answers at once."""
        return self._event is None or self._event.query()

    def value(self) -> bool:
        """Wait for it, if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


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
    noise_bv = torch.empty_like(probs_bv)  # the likeliest of p / Exp(1) is drawn with probability p
    for noise_v, rng in zip(noise_bv, rngs, strict=True):
        noise_v.exponential_(generator=rng)
    return order_bv.gather(1, (probs_bv / noise_bv).argmax(1, keepdim=True))[:, 0]


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

"""What a model has read so far: a decoding state of one row, and the logits of what comes next."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bmojo import BMojoLM
from bmojo.prefill import pieces
from bmojo.state import DecodingState
from pipelines.serving.scores import TokenScore, token_scores
from pipelines.stages.train.device import device_of


@dataclass(frozen=True)
class Context:
    """Never changed: what continues it works on copies, so any number may."""

    state: DecodingState
    logits_v: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.state.position_b[0])


class Scoring(NamedTuple):
    """Arguments of `token_scores`."""

    num_top: int
    num_token_ids: int


class Reading:
    """Tokens on their way into a context, a piece at a time.

    Where pieces are cut depends on positions alone, so that what else the machine does changes no bit of the result.

    Attributes:
        context: what is read at the end; before, what it continues.
        scores: of the tokens read so far, if asked for; None for one that begins a document.
    """

    def __init__(
        self, model: BMojoLM, context: Context | None, tokens: Sequence[int], piece_tokens: int,
        scoring: Scoring | None = None,
    ) -> None:  # fmt: skip
        """Args: context: None: the beginning; there must be a token then. piece_tokens: about how many are read at a
        time. scoring: how to score the tokens, if at all."""
        if context is None and not tokens:
            raise ValueError("there is nothing to read: give at least one token.")
        self.context = context
        self.scores: list[TokenScore | None] = []
        self._model, self._tokens, self._scoring = model, list(tokens), scoring
        self._tokens_t = torch.tensor(self._tokens, dtype=torch.long, device=device_of(model))
        self._start = 0 if context is None else context.num_tokens
        self._pieces = list(pieces(self._start, len(tokens), model.config.chunk_size, piece_tokens))
        self._num_read = 0
        self._state = model.init_state(1) if context is None else context.state.clone() if tokens else context.state
        self._logits_v = None if context is None else context.logits_v

    @property
    def is_done(self) -> bool:
        return self._num_read == len(self._pieces)

    @torch.no_grad()
    def advance(self) -> int:
        """Read a piece. Returns its number of tokens."""
        first, last = self._pieces[self._num_read]
        x_td = self._model.read_piece(self._tokens_t[None, first:last], self._start + first, self._state)[0]
        if self._scoring is not None:
            self._score(x_td[:-1], self._tokens[first:last], self._scoring)
        self._logits_v = self._model.head(x_td[-1:])[0]
        self._num_read += 1
        if self.is_done:
            self.context = Context(self._state, self._logits_v)
        return last - first

    def _score(self, x_td: Tensor, tokens: Sequence[int], scoring: Scoring) -> None:
        """Args: x_td: the stream before each token but the first, whose logits are at hand if any are."""
        if self._logits_v is None:
            self.scores.append(None)
        else:
            self.scores += token_scores(self._logits_v[None], tokens[:1], *scoring)
        if len(tokens) > 1:
            self.scores += token_scores(self._model.head(x_td), tokens[1:], *scoring)


def model_digest(model: BMojoLM, tokenizer_sha256: str) -> str:
    """SHA-256 of all that the meaning of a decoding state depends on: config, weights as they compute, tokenizer."""
    digest = hashlib.sha256(f"{model.config.model_dump_json()}\0{tokenizer_sha256}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

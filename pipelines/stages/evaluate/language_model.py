"""What the measures ask of a model and its tokenizer, whoever wrote their code."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bmojo import BMojoLM
from bmojo.generation import generate
from pipelines.stages.train.device import device_of


class Drawing(NamedTuple):
    """How tokens are drawn: see bmojo.generation.generate."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class LanguageModel(Protocol):
    """A causal language model on one device. Shapes: b rows, t tokens, s positions, v ids of the model's vocabulary."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    @property
    def vocab_size(self) -> int:
        """Number of logits, ids that pad the vocabulary included."""

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence it can read; None: no limit."""

    def token_losses(
        self, tokens_bt: Tensor, targets_bt: Tensor, doc_ids_bt: Tensor | None = None, wanted_bt: Tensor | None = None
    ) -> Tensor:
        """nll_bt, float32: the negative log-likelihood of each target in nats, 0 where the target is -100.

        Args: doc_ids_bt: equal within a document; None: each row is one, padded on the right if at all.
            wanted_bt: see BMojoLM.forward.
        Raises: ValueError: the model cannot keep documents apart.
        """

    def logits_at(
        self,
        tokens_bt: Tensor,
        rows_s: Tensor,
        columns_s: Tensor,
        doc_ids_bt: Tensor | None = None,
        wanted_bt: Tensor | None = None,
    ) -> Tensor:
        """logits_sv for what follows the tokens at these positions. Rows are padded on the right.

        Args, Raises: see token_losses.
        """

    def generate(
        self,
        prompt_bt: Tensor,
        drawing: Drawing,
        stop_tokens: Collection[int] = (),
        valid_bt: Tensor | None = None,
        num_token_ids: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield tokens_b; see bmojo.generation.generate."""


class TextTokenizer(Protocol):
    """What scoring text needs of a tokenizer: data.tokenizer.Tokenizer's, or one of transformers'."""

    @property
    def eod_id(self) -> int:
        """Id of the token that ends a document."""

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What stands before the first token of every document."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes that ids stand for; special tokens stand for none."""


def beginning(tokenizer: TextTokenizer) -> list[int]:
    """Ids for a model to begin a document with: at least one, so that the first token can be predicted."""
    return list(tokenizer.start_ids) or [tokenizer.eod_id]


@dataclass(frozen=True)
class NativeModel:
    """A model of ours."""

    module: BMojoLM

    @property
    def device(self) -> torch.device:
        """See LanguageModel."""
        return device_of(self.module)

    @property
    def vocab_size(self) -> int:
        """See LanguageModel."""
        return self.module.embedding.num_embeddings

    @property
    def max_tokens(self) -> None:
        """None: positions are relative, and memory does not grow."""
        return None

    def token_losses(
        self, tokens_bt: Tensor, targets_bt: Tensor, doc_ids_bt: Tensor | None = None, wanted_bt: Tensor | None = None
    ) -> Tensor:
        """See LanguageModel."""
        nll_bt = self.module(tokens_bt, targets_bt, doc_ids_bt, token_losses=True, wanted_bt=wanted_bt).nll_bt
        assert nll_bt is not None
        return nll_bt

    def logits_at(
        self,
        tokens_bt: Tensor,
        rows_s: Tensor,
        columns_s: Tensor,
        doc_ids_bt: Tensor | None = None,
        wanted_bt: Tensor | None = None,
    ) -> Tensor:
        """See LanguageModel."""
        x_btd = self.module.features(tokens_bt, doc_ids_bt, wanted_bt)
        logits_sv: Tensor = self.module.head(x_btd[rows_s, columns_s])
        return logits_sv

    def generate(
        self,
        prompt_bt: Tensor,
        drawing: Drawing,
        stop_tokens: Collection[int] = (),
        valid_bt: Tensor | None = None,
        num_token_ids: int | None = None,
    ) -> Iterator[Tensor]:
        """See LanguageModel."""
        return generate(
            self.module,
            prompt_bt,
            **drawing._asdict(),
            stop_tokens=stop_tokens,
            valid_bt=valid_bt,
            num_token_ids=num_token_ids,
        )

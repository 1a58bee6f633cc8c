"""Scores of a model on text: negative log-likelihood over packed sequences and by position in a long context.

Shapes: b batch, t time. Sums are float64, so that the figures do not depend on the order of millions of small terms.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bmojo import BMojoLM
from data.shards import TokenBatch
from pipelines.stages.numbers import perplexity


@dataclass(frozen=True)
class Score:
    """Total negative log-likelihood over some targets, and how many tokens and bytes of text those are.

    Attributes:
        num_bytes: 0 if the targets are no text.
        num_right: targets that are the likeliest token; 0 if nobody counted.
    """

    nll_nats: float
    num_tokens: int
    num_bytes: int
    num_right: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nll_nats + other.nll_nats,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
            self.num_right + other.num_right,
        )

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of text, which compares models with different tokenizers (and gzip)."""
        return self.nll_nats / math.log(2) / self.num_bytes


@torch.inference_mode()
def score_batches(
    model: BMojoLM, batches: Iterable[TokenBatch], token_num_bytes: np.ndarray | None, counts_right: bool = False
) -> Score:
    """Score packed sequences, documents kept apart.

    Args:
        token_num_bytes: bytes each token id stands for; None: they are no text.
        counts_right: also count the targets that the likeliest token hits, which costs another forward pass.
    Raises: ValueError: there is no target at all.
    """
    device = next(model.parameters()).device
    num_bytes_of = None if token_num_bytes is None else torch.as_tensor(token_num_bytes, dtype=torch.int64)
    total = Score(0.0, 0, 0)
    for batch in batches:
        tokens_bt, targets_bt, doc_ids_bt = (part.to(device) for part in batch)
        output = model(tokens_bt, targets_bt, doc_ids_bt, token_losses=True)
        scored = batch.targets_bt[batch.targets_bt >= 0]
        total += Score(
            output.nll_bt.double().sum().item(),
            scored.numel(),
            0 if num_bytes_of is None else int(num_bytes_of[scored].sum()),
            _num_right(model, tokens_bt, targets_bt, doc_ids_bt) if counts_right else 0,
        )
    if not total.num_tokens:
        raise ValueError("no validation token to score: the validation split is empty.")
    return total


def _num_right(model: BMojoLM, tokens_bt: torch.Tensor, targets_bt: torch.Tensor, doc_ids_bt: torch.Tensor) -> int:
    is_target_bt = targets_bt >= 0
    logits_sv = model.head(model.features(tokens_bt, doc_ids_bt)[is_target_bt])
    return int((logits_sv.argmax(-1) == targets_bt[is_target_bt]).sum())


@torch.inference_mode()
def score_by_position(model: BMojoLM, window: np.ndarray, bin_ends: Sequence[int]) -> np.ndarray:
    """Sum of the losses in each stretch of the context, of a text that begins with an empty memory.

    Args:
        window: token ids, one more than the last of `bin_ends`.
        bin_ends: bin i covers the positions from bin_ends[i-1] (0 at first) to bin_ends[i], exclusive.
    """
    device = next(model.parameters()).device
    tokens_1t = torch.as_tensor(window.astype(np.int64), device=device)[None]
    nll_t = model(tokens_1t[:, :-1], tokens_1t[:, 1:], token_losses=True).nll_bt[0].double().cpu().numpy()
    return np.array([nll_t[start:end].sum() for start, end in zip([0, *bin_ends], bin_ends, strict=False)])


def long_windows(documents: Iterable[np.ndarray], window_tokens: int, max_windows: int) -> list[np.ndarray]:
    """Stretches of `window_tokens` + 1 ids from the starts of documents long enough, then from further into them.

    Round r takes the r-th stretch of every document, so that few documents do not make up all windows.
    """
    long = [document for document in documents if len(document) > window_tokens]
    windows: list[np.ndarray] = []
    start = 0
    while len(windows) < max_windows:
        stretches = [document[start : start + window_tokens + 1] for document in long]
        stretches = [stretch for stretch in stretches if len(stretch) == window_tokens + 1]
        if not stretches:
            break
        windows += stretches[: max_windows - len(windows)]
        start += window_tokens
    return windows


def position_bins(seq_len: int, context_tokens: int, bins_per_seq_len: int = 8) -> list[int]:
    """Ends of equal bins up to `context_tokens`; a bin ends exactly at each multiple of the training length."""
    step = max(seq_len // bins_per_seq_len, 1)
    return sorted({*range(step, context_tokens + 1, step), *range(seq_len, context_tokens + 1, seq_len)})


def gzip_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of `gzip -9` on the same documents, each compressed alone, as files on a disk would be.

    Raises: ValueError: the documents hold no byte.
    """
    raw = compressed = 0
    for document in documents:
        raw += len(document)
        compressed += len(gzip.compress(document, compresslevel=9, mtime=0))
    if not raw:
        raise ValueError("no byte to compress: the validation split is empty.")
    return 8 * compressed / raw

"""Scores of a model on text: negative log-likelihood over packed sequences and by position in a long context.

Shapes: b batch, t time. Sums are float64, so that the figures do not depend on the order of millions of small terms.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from bmojo import BMojoLM
from data.shards import TokenBatch
from pipelines.stages.numbers import perplexity
from pipelines.stages.train.device import copy_to, device_of


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
    """Score packed sequences, documents kept apart. The host reads the next batch while a GPU computes, and waits once.

    Args:
        token_num_bytes: bytes each token id stands for; None: they are no text.
        counts_right: also count the targets that the likeliest token hits, which costs another forward pass.
    Raises: ValueError: there is no target at all.
    """
    device = device_of(model)
    num_bytes_of = None if token_num_bytes is None else torch.as_tensor(token_num_bytes, dtype=torch.int64)
    num_tokens = num_bytes = 0
    of_batches: list[torch.Tensor] = []  # nll and hits, float64, on the device
    for batch in batches:
        tokens_bt, targets_bt, doc_ids_bt = (copy_to(device, part) for part in batch)
        nll_bt = model(tokens_bt, targets_bt, doc_ids_bt, token_losses=True).nll_bt
        is_target_bt = batch.targets_bt >= 0
        scored_s = batch.targets_bt[is_target_bt]
        num_tokens += scored_s.numel()
        num_bytes += 0 if num_bytes_of is None else int(num_bytes_of[scored_s].sum())
        num_right = torch.zeros((), dtype=torch.float64, device=device)
        if counts_right:
            at_s = copy_to(device, is_target_bt.flatten().nonzero()[:, 0])
            logits_sv = model.head(model.features(tokens_bt, doc_ids_bt).flatten(0, 1)[at_s])
            num_right = (logits_sv.argmax(-1) == targets_bt.flatten()[at_s]).double().sum()
        of_batches.append(torch.stack((nll_bt.double().sum(), num_right)))
    if not num_tokens:
        raise ValueError("no validation token to score: the validation split is empty.")
    total = Score(0.0, num_tokens, num_bytes)
    for nll_nats, num_right_of_batch in torch.stack(of_batches).tolist():
        total += Score(nll_nats, 0, 0, int(num_right_of_batch))
    return total


@torch.inference_mode()
def score_by_position(model: BMojoLM, windows_nt: np.ndarray, bin_ends: Sequence[int]) -> np.ndarray:
    """Sum of the losses in each stretch of the context, of texts that begin with an empty memory.

    Args:
        windows_nt: token ids of each text, one more than the last of `bin_ends`.
        bin_ends: bin i covers the positions from bin_ends[i-1] (0 at first) to bin_ends[i], exclusive.
    Returns: nats of each text in each bin, (n, bins).
    """
    device = device_of(model)
    ids_nt = copy_to(device, torch.from_numpy(windows_nt.astype(np.int64)))
    nll_nt = model(ids_nt[:, :-1], ids_nt[:, 1:], token_losses=True).nll_bt.double().cpu().numpy()
    bins = list(pairwise([0, *bin_ends]))
    return np.array([[nll_t[start:end].sum() for start, end in bins] for nll_t in nll_nt])


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

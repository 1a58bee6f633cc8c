"""Reading prompts into a decoding state: in pieces aligned to chunks, rows of one length at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from bmojo.state import DecodingState

PIECE_TOKENS = 2048  # of a row
GPU_PIECE_TOKENS = 32768  # of all rows: with fewer, a GPU of an H100's size waits for launches


class Reader(Protocol):
    """Read rows that are all at position `start` into a state, in place. Returns logits_bv after the last token."""

    def __call__(self, tokens_bt: Tensor, start: int, state: DecodingState) -> Tensor: ...


def prefill(
    read: Reader, tokens_bt: Tensor, state: DecodingState, valid_bt: Tensor | None
) -> tuple[Tensor, DecodingState]:
    """See BMojoLM.prefill; the state may be changed. Rows that differ in length or in position are read group by group,
    each without padding, so that a row's result does not depend on the others."""
    batch_size, t = tokens_bt.shape
    if batch_size == 0 or t == 0:
        raise ValueError(f"prefill got {batch_size} rows of {t} tokens; it needs a row, and a token in each.")
    if state.batch_size != batch_size:
        raise ValueError(f"prefill got {batch_size} rows of tokens for a state of {state.batch_size} rows.")
    spans = _spans(valid_bt) if valid_bt is not None else [(0, t)] * batch_size
    groups: dict[tuple[int, int], list[int]] = {}
    for row, ((first, last), start) in enumerate(zip(spans, state.position_b.tolist(), strict=True)):
        groups.setdefault((last - first, start), []).append(row)
    if len(groups) == 1:
        ((length, start),) = groups
        tokens = tokens_bt if length == t else _rows(tokens_bt, spans, range(batch_size))
        return read(tokens, start, state), state
    logits, parts, order = [], [], []
    for (_, start), rows in groups.items():
        part = state.select(torch.tensor(rows, device=tokens_bt.device))
        logits.append(read(_rows(tokens_bt, spans, rows), start, part))
        parts.append(part)
        order += rows
    back = torch.tensor(order, device=tokens_bt.device).argsort()
    return torch.cat(logits)[back], DecodingState.join(parts).select(back)


def piece_tokens(num_rows: int, on_gpu: bool) -> int:
    """About how many tokens of each row are read at a time."""
    return max(PIECE_TOKENS, GPU_PIECE_TOKENS // num_rows) if on_gpu else PIECE_TOKENS


def pieces(start: int, num_tokens: int, chunk_size: int, at_a_time: int) -> Iterator[tuple[int, int]]:
    """Cut tokens that begin at position `start` into [first, last) that begin on a multiple of chunk_size, or end in
    the chunk where they begin."""
    piece = max(1, at_a_time // chunk_size) * chunk_size
    first = 0
    while first < num_tokens:
        into_chunk = (start + first) % chunk_size
        last = min(num_tokens, first + (chunk_size - into_chunk if into_chunk else piece))
        yield first, last
        first = last


def _rows(tokens_bt: Tensor, spans: list[tuple[int, int]], rows: list[int] | range) -> Tensor:
    return torch.stack([tokens_bt[row, spans[row][0] : spans[row][1]] for row in rows])


def _spans(valid_bt: Tensor) -> list[tuple[int, int]]:
    """[first, last) of the tokens of each row. Raises ValueError if padding is inside a row, or all of it."""
    spans = []
    for row, valid in enumerate(valid_bt.bool().tolist()):
        count = sum(valid)
        first = valid.index(True) if count else 0
        if not count or not all(valid[first : first + count]):
            raise ValueError(f"row {row}: padding must be on the left or on the right of at least one token.")
        spans.append((first, first + count))
    return spans

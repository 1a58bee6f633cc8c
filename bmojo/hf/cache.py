"""The decoding state as generate() hands it from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmojo.decoding import Decoder
from bmojo.model import BMojoLM
from bmojo.state import DecodingState


class BMojoCache:
    """What `past_key_values` is for this model: the state of every row, of constant size in the number of tokens.

    Like transformers' caches it is updated in place. It cannot be rolled back, so assisted decoding is not possible.
    """

    is_compileable = False
    is_linear = (False,)  # asked layer by layer: whether tokens read before must be left out of input_ids

    def __init__(self, state: DecodingState, num_columns: int) -> None:
        self._state = state
        self._decoder: Decoder | None = None  # what reads single tokens, if any have been
        self.num_columns = num_columns  # of input_ids that were read, padding included

    @property
    def state(self) -> DecodingState:
        """The state of every row."""
        return self._state if self._decoder is None else self._decoder.state

    @state.setter
    def state(self, state: DecodingState) -> None:
        self._state = state
        if self._decoder is not None:
            self._decoder.hold(state)

    def step(self, model: BMojoLM, tokens_b: Tensor) -> Tensor:
        """Read a token per row. Returns logits_bv for the next, which no later call overwrites."""
        if self._decoder is None:
            self._decoder = Decoder(model, self._state)
        logits_bv = self._decoder.step(tokens_b)
        return logits_bv.clone() if logits_bv.is_cuda else logits_bv

    def __deepcopy__(self, memo: dict[int, Any]) -> BMojoCache:
        """A fork, without the CUDA graph."""
        return BMojoCache(self.state.clone(), self.num_columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids read so far."""
        return self.num_columns

    def get_max_cache_shape(self) -> int | None:
        """No limit on the number of tokens."""
        return None

    def num_bytes(self) -> int:
        """Size of the state's tensors."""
        return self.state.num_bytes()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows that beam search chose."""
        self.state = self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, for several continuations of one prompt."""
        rows = torch.arange(self.state.batch_size, device=self.state.position_b.device)
        self.state = self.state.select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self.state = self.state.select(indices)

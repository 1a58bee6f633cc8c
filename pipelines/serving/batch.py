"""Rows of one decoding state, which answers join and leave between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmojo import BMojoLM
from bmojo.decoding import Decoder
from pipelines.serving.context import Context
from pipelines.stages.train.device import device_of

_BLOCK = 32  # elements that a vectorised function of torch on a CPU takes at a time, in float32 and AVX-512


class Batch:
    """A decoding state whose number of rows never changes, so a row's tokens are the same bits whoever is beside it.

    The kernels of a matrix product depend on the number of rows, and round differently. Idle rows read token 0 at
    position 0. On a GPU the constant shape is that of one CUDA graph.

    Args:
        num_rows: answers at a time, at least; see `rounded`.
        context_tokens: room of a row in layers of full attention; other layers need none.
    Attributes:
        room: tokens that a row can hold; None: any number.
    """

    def __init__(self, model: BMojoLM, num_rows: int, context_tokens: int) -> None:
        state = model.init_state(num_rows)
        self.num_rows = num_rows
        self.room = context_tokens if state.room is not None else None
        if self.room is not None:
            state.reserve(self.room)
        self._decoder = Decoder(model, state, max_tokens=self.room)
        self._device = device_of(model)
        self._free = list(range(num_rows))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def join(self, context: Context) -> int:
        """A row that continues the context, until `leave`."""
        row = self._free.pop()
        self._decoder.state.put(row, context.state)
        return row

    def leave(self, row: int) -> None:
        self._free.append(row)

    def step(self, token_of_row: dict[int, int]) -> Tensor:
        """Read a token in each row that is in use. Returns logits_bv of all rows; the next call may overwrite them."""
        tokens = [token_of_row.get(row, 0) for row in range(self.num_rows)]
        logits_bv = self._decoder.step(torch.tensor(tokens, device=self._device))
        in_use_b = torch.tensor([row in token_of_row for row in range(self.num_rows)], device=self._device)
        self._decoder.state.position_b.mul_(in_use_b)
        return logits_bv


def rounded(model: BMojoLM, num_rows: int) -> int:
    """The next number of rows with which each row is computed alike, wherever it stands.

    On a CPU, torch computes the gates [rows, heads] of state-space layers in blocks of elements. What is left over at
    the end goes through other code, which rounds differently.
    """
    states = model.init_state(1).tensors()
    heads = [x.shape[1] for path, x in states.items() if path.endswith(".ssm")]
    multiple = math.lcm(1, *(_BLOCK // math.gcd(_BLOCK, count) for count in heads))
    return math.ceil(num_rows / multiple) * multiple

"""Reading tokens into a decoding state one after another: each token is one replay of a recording.

On a GPU it is a CUDA graph, on a CPU the calls of a step without what decides about them (kernels.cpp.recording).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bmojo.state import DecodingState
from kernels.cpp.recording import record as record_on_cpu

if TYPE_CHECKING:
    from bmojo.model import BMojoLM

logger = logging.getLogger(__name__)
MIN_ROOM = 256  # tokens that a cache of full attention is first given room for

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]


class Decoder:
    """A model, and a state into which it reads a token per row and call.

    The first call runs as usual, which compiles what is not compiled. The second is recorded, and from then on a call
    launches the recording: the shapes are constant, and the host waits for nothing. What cannot be recorded runs as
    usual in every call. Weights may change between calls, in place.

    Args:
        state: updated in place. Caches of full attention get room for twice the tokens whenever they are full, but
            for no more than max_tokens per row, and a new recording then.
        record: for tests; None: that of the device.
    """

    def __init__(
        self, model: BMojoLM, state: DecodingState, max_tokens: int | None = None, record: Record | None = None
    ) -> None:
        self.state = state
        self._model, self._max_tokens = model, max_tokens
        self._record: Record | None = record or (capture if state.position_b.is_cuda else record_on_cpu)
        self._tokens_b = torch.zeros_like(state.position_b)
        self._replay: Replay | None = None
        self._is_warm = False
        self._num_left: int | None = 0 if state.room is not None else None  # tokens before there is no more room

    @torch.no_grad()
    def step(self, tokens_b: Tensor) -> Tensor:
        """Read a token per row. Returns logits_bv for the next; the next call may overwrite them."""
        if self._record is None:
            return self._read(tokens_b)
        self._make_room()
        if not self._is_warm:
            self._is_warm = True
            return self._read(tokens_b)
        self._tokens_b.copy_(tokens_b)
        if self._replay is None:
            try:
                with torch.cuda.device_of(self._tokens_b):
                    self._replay = self._record(lambda: self._read(self._tokens_b))
            except RuntimeError as error:
                if self._record is record_on_cpu:  # which ran the step: it is the step's own error
                    raise
                logger.warning("decoding runs without a CUDA graph, which takes many times as long: %s", error)
                self._record = None
                return self._read(tokens_b)
        return self._replay()

    def hold(self, state: DecodingState) -> None:
        """Continue from another state, which is copied if it has the shapes of the one held."""
        new, old = state.tensors(), self.state.tensors()
        if self._replay is not None and all(new[path].shape == x.shape for path, x in old.items()):
            self.state.copy_(state)
        else:
            self.state, self._replay, self._is_warm = state, None, False
            self._tokens_b = torch.zeros_like(state.position_b)
        self._num_left = None if self._num_left is None else 0

    def _read(self, tokens_b: Tensor) -> Tensor:
        return self._model.step(tokens_b, self.state)[0]

    def _make_room(self) -> None:
        """Look at positions only if those counted so far may have filled the caches."""
        if self._num_left is None:
            return
        if self._num_left == 0:
            num_tokens, room = int(self.state.position_b.max()), self.state.room or 0
            if num_tokens >= room:
                more = max(2 * num_tokens, MIN_ROOM)
                expected = self._max_tokens or 0
                self.state.reserve(min(expected, more) if expected > num_tokens else more)
                self._replay = None
                room = self.state.room or 0
            self._num_left = room - num_tokens
        self._num_left -= 1


def capture(function: Callable[[], Tensor]) -> Replay:
    """Record what a function launches on the current GPU as a CUDA graph. Its result is overwritten by each replay.

    Raises: RuntimeError: the function waits for the GPU, or does something else that a graph cannot hold.
    """
    graph, stream, device = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_device()
    cached = torch.is_autocast_cache_enabled()
    with torch.cuda.stream(torch.cuda.current_stream()):  # so that a failure leaves the current stream as it was
        torch.set_autocast_cache_enabled(False)  # the graph would read casts that are freed with the cache
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.set_autocast_cache_enabled(cached)

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay

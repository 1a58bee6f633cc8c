"""What follows from where a backend keeps its tensors: the named tensors of a Trainer, out and in, in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch

from pipelines.stages.train.backends.zero import Layout, Place
from pipelines.stages.train.optimizers.average import WeightAverage
from pipelines.stages.train.pieces import Piece, Read, gather
from pipelines.stages.train.trainer import PARAM, named_shapes


class NamedTensors:
    """The part of a Trainer that is the same however tensors are sharded; see Trainer."""

    exact_device: torch.device
    optimizer: torch.optim.Optimizer
    _layout: Layout
    _state_names: Mapping[str, Sequence[str]]
    _average: WeightAverage | None

    @property
    def _whole_shapes(self) -> dict[str, torch.Size]:
        """Of the parameters."""
        raise NotImplementedError

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """See Trainer."""
        return named_shapes(self._whole_shapes, self._state_names)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See Trainer."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        assert self._average is not None, "ema_decay is not set"
        self._layout.begin_load()
        self._average.swap()
        self._layout.end_load()

    def tensor(self, key: str) -> torch.Tensor:
        """See Trainer."""
        return gather(self._piece(*key.split("/", 1)), self.shapes[key], self.exact_device)

    def pieces(self) -> dict[str, Piece]:
        """See Trainer."""
        found = {key: self._piece(*key.split("/", 1)) for key in self.shapes}
        return {key: piece for key, piece in found.items() if piece is not None}

    def load(self, read: Read, num_steps: int) -> None:
        """See Trainer."""
        self._layout.begin_load()
        for key in self.shapes:
            prefix, name = key.split("/", 1)
            place = self._layout.held.get(name)
            if place is not None:
                self._kept(prefix, place).copy_(read(key, place.start, place.numel))
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(num_steps))
        if self._average is not None:
            self._average.load(num_steps)
        self._layout.end_load()

    def _piece(self, prefix: str, name: str) -> Piece | None:
        place = self._layout.own.get(name)
        return None if place is None else Piece(place.start, self._kept(prefix, place))

    def _kept(self, prefix: str, place: Place) -> torch.Tensor:
        """The parameter's values at a place, or those of its optimizer state."""
        return place.of(place.updated if prefix == PARAM else self.optimizer.state[place.updated][prefix])

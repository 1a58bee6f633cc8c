"""Which positions of training each optimizer step reads: global batches, which may grow in the course of training."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple


class BatchPhase(NamedTuple):
    """Batches of one size, for so many steps."""

    size: int
    num_steps: int


class Batches:
    """Step s (from 0) reads the positions start(s) to start(s) + size(s) - 1.

    Args:
        size: of the batches after all phases.
        phases: before that, in their order.
        first_position: where step 0 begins; above 0 where training goes on in the data of another one.
    """

    def __init__(self, size: int, phases: Sequence[BatchPhase] = (), first_position: int = 0) -> None:
        self.final_size, self.phases, self.first_position = size, tuple(phases), first_position
        self._first_steps, self._starts = [0], [first_position]
        for phase in phases:
            self._first_steps.append(self._first_steps[-1] + phase.num_steps)
            self._starts.append(self._starts[-1] + phase.num_steps * phase.size)
        self._sizes = [*(phase.size for phase in phases), size]

    def size(self, step: int) -> int:
        """Samples of a step."""
        return self._sizes[bisect_right(self._first_steps, step) - 1]

    def start(self, step: int) -> int:
        """Position of a step's first sample: those before it are done when the step begins."""
        number = bisect_right(self._first_steps, step) - 1
        return self._starts[number] + (step - self._first_steps[number]) * self._sizes[number]

    def step_at(self, position: int) -> int:
        """The step that begins at a position, or the first that begins after it."""
        number = max(bisect_right(self._starts, position) - 1, 0)
        inside = max(position - self._starts[number], 0)
        return self._first_steps[number] + -(-inside // self._sizes[number])

    @property
    def common_divisor(self) -> int:
        """The greatest number that divides every size."""
        return math.gcd(*self._sizes)

    @property
    def identity(self) -> dict[str, Any]:
        """What positions follow from. JSON; empty if all batches have one size, from the beginning on."""
        if not self.phases and not self.first_position:
            return {}
        return {"batch_phases": [list(phase) for phase in self.phases], "first_position": self.first_position}

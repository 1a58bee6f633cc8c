"""Which of several sources each position of training is taken from: integer slots, so that shares are exact.

The weights of a phase give a cycle of slots: as many of each source as its weight says, spread as evenly as whole slots
allow. The job of each source's j-th slot may be done in the positions floor((j - 1) / w) to ceil(j / w) - 1, where w is
its share; by the earliest deadline first all are met (Pfair scheduling, Baruah et al., Algorithmica 1996). So after any
number n of positions a source has had n w samples, less than one more or less.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data.errors import DataError

MAX_SLOTS = 1 << 16


def shares_of(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as exact shares that add up to 1: 0.1 means a tenth, not the binary number next to it.

    Raises: DataError: no weight is above 0, or their cycle would be too long.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    if total <= 0 or min(exact.values()) < 0:
        raise DataError(f"weights {dict(weights)}: expected numbers of 0 or more, at least one above 0.")
    shares = {name: weight / total for name, weight in exact.items()}
    slots = math.lcm(*(share.denominator for share in shares.values()))
    if slots > MAX_SLOTS:
        raise DataError(
            f"weights {dict(weights)} need a cycle of {slots:,} samples to be exact, at most {MAX_SLOTS:,}: give "
            "numbers of fewer digits, such as 0.7, 0.2 and 0.1."
        )
    return shares


class Phase(NamedTuple):
    """From which position on which shares count, one for each source."""

    start: int
    shares: tuple[Fraction, ...]


class Slots:
    """One cycle: the source of each slot, and how many slots of each source stand before it."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        self.size = math.lcm(*(share.denominator for share in shares))
        self.sources = _evenly_spread(shares, self.size)
        is_of = self.sources[:, None] == np.arange(len(shares))
        self.before = np.concatenate((np.zeros((1, len(shares)), np.int64), is_of.cumsum(axis=0)))

    def counts(self, num_positions: np.ndarray | int) -> np.ndarray:
        """How many of the first positions are of each source: (...,) -> (..., sources)."""
        cycles, rest = np.divmod(np.asarray(num_positions), self.size)
        return cycles[..., None] * self.before[-1] + self.before[rest]


def _evenly_spread(shares: Sequence[Fraction], size: int) -> np.ndarray:
    sources = np.empty(size, np.int64)
    jobs = [(0, source, 1) for source, share in enumerate(shares) if share]  # (released at, source, j)
    heapq.heapify(jobs)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, j)
    for slot in range(size):
        while jobs and jobs[0][0] <= slot:
            _, source, job = heapq.heappop(jobs)
            heapq.heappush(ready, (math.ceil(job / shares[source]), source, job))
        _, source, job = heapq.heappop(ready)
        sources[slot] = source
        heapq.heappush(jobs, (math.floor(job / shares[source]), source, job + 1))
    return sources


class Mixture:
    """The source of every position, and the position within that source.

    Args: phases: by their start; the first starts at 0.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        self._slots = [Slots(phase.shares) for phase in self.phases]

    @classmethod
    def of_one(cls) -> Mixture:
        """All positions are of the one source there is."""
        return cls([Phase(0, (Fraction(1),))])

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the source of each position, and the position in the source's own order; int64."""
        positions = np.asarray(positions, np.int64)
        sources, own = np.empty_like(positions), np.empty_like(positions)
        phase_of = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(phase_of).tolist():
            mine, slots = phase_of == number, self._slots[number]
            inside = positions[mine] - self._starts[number]
            source = slots.sources[inside % slots.size]
            sources[mine] = source
            counts = slots.counts(inside) + self._before[number]
            own[mine] = np.take_along_axis(counts, source[:, None], axis=1)[:, 0]
        return sources, own

    def counts(self, num_positions: int) -> list[int]:
        """How many of the first positions are of each source."""
        number = int(np.searchsorted(self._starts, num_positions, side="right")) - 1
        counts: list[int] = (
            self._slots[number].counts(num_positions - self._starts[number]) + self._before[number]
        ).tolist()
        return counts

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([phase.start for phase in self.phases], np.int64)

    @cached_property
    def _before(self) -> list[np.ndarray]:
        """Samples of each source before each phase."""
        before = [np.zeros(len(self.phases[0].shares), np.int64)]
        for slots, length in zip(self._slots, np.diff(self._starts).tolist(), strict=False):
            before.append(before[-1] + slots.counts(length))
        return before

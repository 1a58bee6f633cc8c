"""Batches that grow: which positions a step reads, against counting them one by one."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from data.batches import Batches, BatchPhase

PHASES = st.lists(st.builds(BatchPhase, st.integers(1, 9), st.integers(1, 5)), max_size=4)


@given(st.integers(1, 9), PHASES, st.integers(0, 30))
def test_steps_read_all_positions_in_turn(size: int, phases: list[BatchPhase], first: int) -> None:
    batches = Batches(size, phases, first)
    sizes = [phase.size for phase in phases for _ in range(phase.num_steps)] + [size] * 5
    starts = list(itertools.accumulate(sizes, initial=first))
    assert [batches.size(step) for step in range(len(sizes))] == sizes
    assert [batches.start(step) for step in range(len(starts))] == starts
    for position in range(first, starts[-1] + 1):
        assert batches.step_at(position) == next(step for step, start in enumerate(starts) if start >= position)


@given(st.integers(1, 60), st.lists(st.integers(1, 60), max_size=3))
def test_the_common_divisor_divides_every_size_and_is_the_greatest(size: int, others: list[int]) -> None:
    found = Batches(size, [BatchPhase(other, 1) for other in others]).common_divisor
    divisors = [n for n in range(1, size + 1) if all(each % n == 0 for each in (size, *others))]
    assert found == divisors[-1]


def test_batches_of_one_size_from_the_beginning_leave_old_checkpoints_as_they_were() -> None:
    assert Batches(8).identity == {}
    assert Batches(8, [BatchPhase(2, 3)]).identity == {"batch_phases": [[2, 3]], "first_position": 0}
    assert Batches(8, first_position=40).identity == {"batch_phases": [], "first_position": 40}

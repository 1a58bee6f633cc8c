"""One decoding step of the eidetic memory in plain torch and in C++, against the definition."""

from __future__ import annotations

import pytest

from kernels.innovation_select import reference_step
from tests.kernels.helpers import pairwise
from tests.kernels.innovation_select.steps import (
    SIZES,
    assert_defined,
    assert_slots_stay_within_a_chunk,
    assert_ties_keep_their_order,
)

PATHS = ("torch", "cpp")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("positions", "num_slots", "tau", "with_given"), pairwise(*SIZES))
def test_a_step_is_the_definition(path, positions, num_slots, tau, with_given):
    assert_defined(path, reference_step.made(positions, (5, 4), (2, 4), num_slots, with_given=with_given, tau=tau))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tau", [None, 8.0])
def test_ties_go_to_what_was_kept_and_then_to_the_earlier_position(path, tau):
    assert_ties_keep_their_order(path, tau)


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_do_not_begin_a_chunk_keep_their_slots(path):
    assert_slots_stay_within_a_chunk(path)

"""Which core is whose, by what Ray gave and by local ranks: no environment is touched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from base.errors import UserError
from pipelines.neuron.environment import (
    CACHE_DIR,
    COMPILER_FLAGS,
    VISIBLE_CORES,
    CompilerSettings,
    CoreAssignment,
    Place,
    prepare_env,
)


def cores(places: Sequence[Place], assignment: CoreAssignment) -> list[str | None]:
    ranks = range(len(places))
    return [prepare_env(places, rank, assignment, CompilerSettings(), {})[VISIBLE_CORES] for rank in ranks]


TWO_MACHINES = [Place("a", 0, (1,)), Place("a", 1, (0,)), Place("b", 0, (0,)), Place("b", 1, (1,))]


def test_on_whole_machines_torch_neuron_takes_the_core_of_the_local_rank() -> None:
    assert cores(TWO_MACHINES, "local_rank") == [None] * 4
    assert cores([Place("a", 0, None), Place("a", 1, None)], "local_rank") == [None, None]


def test_cores_of_ray_ascend_with_the_local_ranks_of_a_machine() -> None:
    places = [Place("a", 1, (3,)), Place("b", 0, (2,)), Place("a", 0, (5,)), Place("a", 2, (1,))]
    assert cores(places, "ray") == ["3", "2", "1", "5"]


@pytest.mark.parametrize(
    ("places", "assignment", "expected"),
    [
        ([Place("a", 0, (2,)), Place("a", 1, (3,))], "local_rank", "needs whole machines.*on the cores 2, 3, expected"),
        ([Place("a", 0, None), Place("a", 1, None)], "ray", "needs a core of Ray's.*Unset RAY_EXPERIMENTAL_NOSET"),
        ([Place("a", 0, (1,)), Place("a", 1, (1,))], "ray", "2 workers and the cores 1, 1"),
        ([Place("a", 0, (0, 1))], "ray", "given the NeuronCores 0, 1, expected one each"),
    ],
)
def test_cores_that_do_not_fit_are_refused(places: list[Place], assignment: CoreAssignment, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        cores(places, assignment)


def test_the_compilers_settings_are_added_to_those_that_are_there() -> None:
    one, before = [Place("a", 0, (0,))], {COMPILER_FLAGS: "--verbose info"}
    found = prepare_env(one, 0, "local_rank", CompilerSettings("/cache", "-O1"), before)
    assert found == {VISIBLE_CORES: None, CACHE_DIR: "/cache", COMPILER_FLAGS: "--verbose info -O1"}
    assert prepare_env(one, 0, "local_rank", CompilerSettings(), before) == {VISIBLE_CORES: None}

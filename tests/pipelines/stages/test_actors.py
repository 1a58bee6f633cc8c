"""Calls in Ray actors: their answers, their processes, and what happens when one dies, raises or finds no room."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import ray.cloudpickle

from base.errors import UserError
from pipelines.engine.stage import Resources
from pipelines.stages.actors import Call, call_actors

pytestmark = pytest.mark.usefixtures("ray_cluster")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

ONE = Resources()


class Toy:
    """What an actor may do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, 0

    def add(self, left: int, right: int) -> tuple[int, int]:
        """The sum, and the number of this actor's process."""
        return left + right, os.getpid()

    def die(self, times: int) -> str:
        """Dies in the first so many calls."""
        deaths = self.folder / "deaths"
        died = len(deaths.read_text()) if deaths.exists() else 0
        if died < times:
            deaths.write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    def fail(self) -> None:
        raise UserError("as it must")


def test_one_process_answers_every_call(tmp_path: Path) -> None:
    answers = dict(call_actors(Toy, (tmp_path,), [Call("add", (n, 1), ONE) for n in range(20)]))
    assert {number: total for number, (total, _) in answers.items()} == {n: n + 1 for n in range(20)}
    assert len({pid for _, pid in answers.values()}) == 1


def test_calls_with_other_resources_have_other_actors(tmp_path: Path) -> None:
    two = Resources(cpus_per_worker=2)
    answers = dict(call_actors(Toy, (tmp_path,), [Call("add", (n, 1), two if n % 2 else ONE) for n in range(8)]))
    pids = {number % 2: pid for number, (_, pid) in answers.items()}
    assert pids[0] != pids[1]
    assert all(pid == pids[number % 2] for number, (_, pid) in answers.items())


@pytest.mark.ci
def test_calls_do_not_wait_for_an_actor_without_room(tmp_path: Path) -> None:
    large = Resources(num_workers=2, cpus_per_worker=3)  # of 4 cores
    answers = dict(call_actors(Toy, (tmp_path,), [Call("add", (n, 1), large) for n in range(6)]))
    assert len(answers) == 6
    mixed = [Call("add", (n, 1), large if n < 2 else ONE) for n in range(5)]
    assert len(dict(call_actors(Toy, (tmp_path,), mixed))) == 5


@pytest.mark.ci
def test_the_calls_of_an_actor_that_dies_are_made_again(tmp_path: Path) -> None:
    calls = [Call("add", (1, 1), ONE), Call("die", (2,), ONE), Call("add", (2, 2), ONE)]
    answers = dict(call_actors(Toy, (tmp_path,), calls))
    assert answers[1] == "done"
    assert (answers[0][0], answers[2][0]) == (2, 4)
    assert answers[0][1] != answers[2][1]


@pytest.mark.ci
def test_a_call_that_kills_every_actor_ends_in_an_error(tmp_path: Path) -> None:
    from pipelines.errors import LostError

    with pytest.raises(LostError, match="Actor Toy: "):
        list(call_actors(Toy, (tmp_path,), [Call("die", (100,), ONE)]))
    assert len((tmp_path / "deaths").read_text()) == 4


def test_what_a_call_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="as it must"):
        list(call_actors(Toy, (tmp_path,), [Call("add", (1, 1), ONE), Call("fail", (), ONE)]))


class Unmakable:
    """What cannot be made is a bug."""

    def __init__(self) -> None:
        raise ValueError("no such thing")

    def call(self) -> None:
        pass


def test_an_actor_that_cannot_be_made_is_an_error_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Actor Unmakable: .*ValueError: no such thing"):
        list(call_actors(Unmakable, (), [Call("call", (), ONE)]))


def test_an_actor_larger_than_every_machine_is_a_user_error(tmp_path: Path) -> None:
    huge = Resources(cpus_per_worker=1000, placement_timeout_s=0.1)
    with pytest.raises(UserError, match="one worker asks for 1000 CPU, and the cluster has room for none"):
        list(call_actors(Toy, (tmp_path,), [Call("add", (1, 1), huge)]))

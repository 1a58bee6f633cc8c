"""Calls of a stage spread over Ray actors, which keep from call to call what is slow to make: a model on its GPU.

A Ray task on a GPU is a new process each time; an actor is one process until it has nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipelines.engine.placement import Demand
from pipelines.engine.stage import Resources
from pipelines.ray_errors import explained_ray
from pipelines.stages.ray_resources import task_options, wait_for_machines
from pipelines.stages.tasks import MAX_RETRIES, user_errors


class Call(NamedTuple):
    """A method of the actors, and what it needs: calls with the same resources share their actors."""

    method: str
    arguments: tuple[Any, ...]
    resources: Resources


class Answer(NamedTuple):
    """The result of the call with this number."""

    number: int
    result: Any


@dataclass
class _Crew:
    """Actors with the same resources. `waiting`: numbers of the calls that none has yet, the first one last."""

    resources: Resources
    waiting: list[int] = field(default_factory=list)

    def start(self, actor_class: type, arguments: tuple[Any, ...]) -> list[Any]:
        """As many actors as can have work."""
        import ray

        options = {"max_restarts": -1, "max_task_retries": MAX_RETRIES, **task_options(self.resources)}
        remote_class = ray.remote(**options)(actor_class)
        return [remote_class.remote(*arguments) for _ in range(min(self.resources.num_workers, len(self.waiting)))]


class _Busy(NamedTuple):
    """An actor at work. `number`: of its call; None: it is starting."""

    actor: Any
    crew: _Crew
    number: int | None


def call_actors(actor_class: type, arguments: tuple[Any, ...], calls: Sequence[Call]) -> Iterator[Answer]:
    """Make the calls in actors made with `arguments`; those with equal resources in at most `num_workers` actors.

    An actor gets a call when it has started, and one at a time, so that no call waits for room that others hold. When
    nothing is left for it, it ends, and gives its resources back.

    Args: actor_class: `__init__` must be quick: what is slow belongs into the first call, which is tried again.
    Yields: answers as they come. The calls of an actor that dies are made again in a new one; when one raises, all end.
    Raises:
        UserError: the data or a right to the disk is at fault, or no machine is large enough for one actor.
        InfrastructureError: the cluster, a disk or the network is.
    """
    import ray

    crews = _crews(calls)
    with explained_ray("Looking for room in the cluster"):
        for crew in crews:
            wait_for_machines(Demand(crew.resources, fewest=1))
    running: dict[Any, _Busy] = {}
    num_left = len(calls)
    try:
        for crew in crews:
            for actor in crew.start(actor_class, arguments):
                running[actor.__ray_ready__.remote()] = _Busy(actor, crew, None)
        while num_left:
            with user_errors(), explained_ray(f"Actor {actor_class.__name__}"):
                (reference, *_), _ = ray.wait(list(running), num_returns=1)
                actor, crew, number = running.pop(reference)
                result = ray.get(reference)
                if crew.waiting:
                    following = crew.waiting.pop()
                    method = getattr(actor, calls[following].method)
                    running[method.remote(*calls[following].arguments)] = _Busy(actor, crew, following)
                else:
                    ray.kill(actor)
            if number is not None:
                num_left -= 1
                yield Answer(number, result)
    finally:
        with suppress(Exception):  # a lost cluster has nothing to end
            for busy in running.values():
                ray.kill(busy.actor)


def _crews(calls: Sequence[Call]) -> list[_Crew]:
    crews: list[_Crew] = []
    for number, call in reversed(list(enumerate(calls))):
        crew = next((crew for crew in crews if crew.resources == call.resources), None)
        if crew is None:
            crew = _Crew(call.resources)
            crews.append(crew)
        crew.waiting.append(number)
    return crews

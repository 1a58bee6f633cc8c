"""How many workers train together: as many as there is room for, chosen for each group (docs/design/0025).

A smaller group than num_workers is looked at again and again: when there is room for a larger one, its workers are
asked to save and leave.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from base.threads import beside
from pipelines.engine.placement import ClusterNode, num_places
from pipelines.engine.stage import Resources
from pipelines.errors import InfrastructureError
from pipelines.stages.ray_resources import asked_for, free_nodes

GRACE_S = 15.0
"""For the whole group to find room before a smaller one starts: Ray frees the room of dead workers, and a machine that
was restarted is back, in about that time."""
_POLL_S = 1.0
_LOOK_EVERY_S = 5.0  # at most

logger = logging.getLogger(__name__)

Nodes = Callable[[], Sequence[ClusterNode]]


def largest(sizes: Sequence[int], num_workers: int) -> int | None:
    """The largest of the sizes, which ascend, that so many workers make; None: even the smallest is larger."""
    return max((size for size in sizes if size <= num_workers), default=None)


def choose_size(
    sizes: Sequence[int],
    resources: Resources,
    list_free: Nodes,
    list_machines: Nodes,
    may_grow: bool,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """The size of the next group.

    The largest size starts at once where there is room for it. Otherwise it is waited for: GRACE_S while a smaller one
    would fit, placement_timeout_s while none does. Where no machine can join, larger sizes than all machines hold are
    not waited for.

    Args: sizes: those allowed, ascending. list_free, list_machines: what the machines have left, and in all.
    Raises: InfrastructureError: there is no room even for the smallest.
    """
    if len(sizes) == 1:
        return sizes[0]  # Ray Train waits for its room
    began = clock()
    while True:
        free = list_free()
        fitting = largest(sizes, num_places(resources, free))
        most = sizes[-1] if may_grow else largest(sizes, num_places(resources, list_machines()))
        if fitting is not None and (fitting == most or clock() - began >= GRACE_S):
            return fitting
        if clock() - began >= resources.placement_timeout_s:
            raise InfrastructureError(
                f"Waited placement_timeout_s={resources.placement_timeout_s:g} s for room for {sizes[0]} workers, the "
                f"fewest that may train (resources.min_workers={resources.min_workers}); other work has the cluster. "
                "The same command resumes."
            )
        sleep(_POLL_S)


@contextmanager
def growing(
    sizes: Sequence[int],
    size: int,
    resources: Resources,
    after_s: float,
    num_begun: Callable[[], int],
    ask: Callable[[], None],
) -> Iterator[None]:
    """While a group of `size` trains: call `ask`, in a thread, once there has been room for a larger one.

    Args: after_s: seconds that the group may train before. num_begun: workers that have begun; before all have, their
        own room may look free. ask: asks the workers to save and leave.
    """
    if size == sizes[-1]:
        yield
        return
    look_every_s = min(_LOOK_EVERY_S, max(0.5, after_s / 12))

    def watch(is_over: threading.Event) -> None:
        try:
            while num_begun() < size:
                if is_over.wait(_POLL_S):
                    return
            if is_over.wait(after_s):
                return
            # An autoscaler makes machines for what is asked. Ray may grant it, which takes it out of what is free.
            with asked_for(resources, sizes[-1] - size) as rest:
                seen = 0
                while seen < 2:  # what is seen once may be what another job is about to take
                    if is_over.wait(look_every_s):
                        return
                    places = sizes[-1] - size if rest.wait(0) else num_places(resources, free_nodes())
                    seen = seen + 1 if (largest(sizes, size + places) or 0) > size else 0
            ask()
        except Exception as error:  # a cluster that does not answer; training goes on as it is
            logger.warning("No longer looking for room for more workers: %s", error)

    with beside(watch, "room for more workers"):
        yield

"""A bit flipped in one worker's memory, under each ZeRO stage in real gloo groups, and what the attempt ends with."""

from __future__ import annotations

import platform
from typing import Any, cast

import pytest

from pipelines.errors import InfrastructureError
from pipelines.stages.train.guards import replicas
from pipelines.stages.train.guards.replicas import Difference, refuse_differing_replicas
from tests.pipelines.stages.train.deepspeed_workers import Result

pytestmark = pytest.mark.ci

BOTH = [0, 1]  # of two ranks none is in the majority


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_flipped_bit_is_found_on_every_rank_and_named(deepspeed_result: Result, stage: int) -> None:
    for alike, first, last in deepspeed_result.replicas[stage]:
        assert alike == []
        assert first == [["param/embedding.weight", BOTH]]
        ((key, ranks),) = last
        assert ranks == BOTH
        assert key.startswith("param/") == (stage > 0), "without ZeRO the moments are replicas too"


def test_what_is_sharded_has_no_replicas(deepspeed_result: Result) -> None:
    assert deepspeed_result.replicas[3] == [[[]], [[]]]


def test_the_rank_that_differs_from_most_is_named_with_its_host() -> None:
    found = replicas._difference("param/head.weight", [7, 7, 5, 7], ["a", "b", "c", "d"])
    assert found == Difference("param/head.weight", (2,), ("c",))
    assert str(found) == "param/head.weight on rank 2 (c)"


class NotedIncidents:
    """Takes the place of Incidents."""

    def __init__(self) -> None:
        self.noted: list[tuple[Any, ...]] = []

    def add(self, kind: str, step: int, message: str, **figures: Any) -> None:
        self.noted.append((kind, step, figures["tensors"]))


def test_a_difference_ends_the_attempt_as_a_fault_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    incidents = NotedIncidents()
    difference = Difference("param/head.weight", (1,), (platform.node(),))
    monkeypatch.setattr(replicas, "differing_replicas", lambda _: [difference])
    with pytest.raises(InfrastructureError, match=r"step 7: param/head.weight on rank 1 .* checkpoint of step 5"):
        refuse_differing_replicas(cast(Any, None), cast(Any, incidents), step=7, saved_step=5)
    assert incidents.noted == [("replicas", 7, [difference._asdict()])]

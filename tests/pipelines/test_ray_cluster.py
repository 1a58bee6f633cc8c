"""What the scheduler learns from the process that keeps the cluster. Its words are real, the process is a stand-in."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import pytest

from base.errors import UserError
from pipelines import ray_cluster
from pipelines.cluster_process import ClusterReport, MachineReport
from pipelines.config import ClusterConfig
from pipelines.engine.failures import classify
from pipelines.errors import LostError
from pipelines.ray_cluster import RayCluster, rejoin
from tests.pipelines.waiting import wait_until

SAYS = "import sys; print(sys.argv[1], flush=True); sys.stdin.read() if len(sys.argv) == 2 else None"
THERE = ClusterReport(address="head:6379", machines=(MachineReport(resources={"CPU": 1.0}, labels={}),))
REFUSED = ClusterReport(failure=classify(UserError("nothing listens on port 6379 of head.")))


def cluster_that_says(monkeypatch: pytest.MonkeyPatch, *reports: ClusterReport) -> RayCluster:
    """Each start of its process says the next report. All but the last end then, as the process of a dead cluster."""
    commands: list[Sequence[str]] = [
        [sys.executable, "-c", SAYS, report.model_dump_json(), *(["ends"] if number < len(reports) else [])]
        for number, report in enumerate(reports, 1)
    ]
    monkeypatch.setattr(ray_cluster, "python_module", lambda module: commands.pop(0))
    return RayCluster(ClusterConfig(address="head:6379"), [], "/storage")


def test_a_cluster_that_was_never_there_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_that_says(monkeypatch, REFUSED)
    with pytest.raises(UserError, match="nothing listens"):
        cluster.start()
    cluster.close()


def test_a_cluster_that_was_there_before_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_that_says(monkeypatch, THERE, REFUSED)
    cluster.start()
    assert [node.resources for node in cluster.nodes()] == [{"CPU": 1.0}]
    wait_until(cluster.is_lost)
    with pytest.raises(LostError, match=r"is gone\. nothing listens"):
        cluster.start()
    cluster.close()


def test_a_cluster_that_comes_back_is_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_that_says(monkeypatch, THERE, THERE)
    cluster.start()
    wait_until(cluster.is_lost)
    cluster.start()
    assert not cluster.is_lost()
    cluster.close()


def test_a_stage_that_cannot_join_a_cluster_that_was_there_is_lost() -> None:
    """Its head died between the scheduler's look and the start of the stage's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(LostError, match=r"is gone\. cluster\.address=.*: nothing listens on port"):
        rejoin(address)

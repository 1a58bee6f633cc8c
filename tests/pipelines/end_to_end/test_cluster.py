"""The same pipeline on a Ray cluster of several nodes that was there before."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.engine.event_log import read_events
from pipelines.engine.events import AttemptLost, Budget, Started
from pipelines.engine.runs import list_runs
from pipelines.storage import open_storage
from tests.pipelines.end_to_end.tiny_pipeline import (
    Finished,
    TinyPipeline,
    kill_tree,
    wait_until,
    write_pipeline,
)

pytestmark = pytest.mark.slow

# Raylets are real; that they share a machine is the one thing that is not.
CLUSTER = """
import sys, time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=2)
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.read()
"""


def test_a_cluster_of_three_raylets_gives_the_same_result(
    tmp_path: Path, finished_pipeline: tuple[TinyPipeline, Finished]
) -> None:
    unbroken, _ = finished_pipeline
    pipeline = write_pipeline(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        try:
            finished = pipeline.run(f"cluster.address={address}")
            assert finished.code == 0, finished.output
            tokens, trained = pipeline.record("tokenize")["output"], pipeline.record("train")["output"]
            large = ("train.lr=1e-4", "train.resources.cpus_per_worker=3", "train.resources.placement_timeout_s=5")
            asked = pipeline.run(f"cluster.address={address}", *large)
        finally:
            cluster.communicate("")
    assert tokens == unbroken.record("tokenize")["output"]
    for name in ("final_train_loss", "final_valid_loss"):
        assert trained[name] == unbroken.record("train")["output"][name]
    assert asked.code == 1, asked.output
    assert "cpus_per_worker" in asked.output or "CPU" in asked.output


SPOT = """
import sys, time
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
spot = cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.add_node(num_cpus=2)
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
deadline_ms = time.time_ns() // 1_000_000 + 90_000
client = ray._raylet.GcsClient(address=cluster.address)
print(client.drain_node(spot.node_id, reason, "spot machine is reclaimed", deadline_ms), flush=True)
sys.stdin.read()
"""


def test_training_saves_its_work_when_its_machine_will_be_taken_away(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SPOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        longer = ("train.max_steps=600", "train.checkpoint_every_steps=600")
        run = pipeline.start("run", str(pipeline.file), f"cluster.address={address}", *longer)
        try:
            wait_until(lambda: len(pipeline.points("train/loss", "train")) >= 3, run)
            cluster.stdin.write("drain\n")
            cluster.stdin.flush()
            output = run.communicate(timeout=420)[0]
        finally:
            if run.poll() is None:
                kill_tree(run)
            cluster.communicate("")
    assert run.returncode == 0, output
    (found,) = list_runs(open_storage(pipeline.storage))
    events = [event for _, event in read_events(found.storage, found.events_relpath)]
    (lost,) = [event for event in events if isinstance(event, AttemptLost)]
    assert lost.budget is Budget.LOST_RETRIES
    assert "a machine will be taken away" in lost.error or "lost a worker" in lost.error
    saved = int(re.search(r"Training stopped after step (\d+)", output)[1])  # type: ignore[index]  # else it fails
    assert 3 <= saved < 600
    starts = [event for event in events if isinstance(event, Started) and event.stage == "train"]
    assert [event.attempt for event in starts] == [1, 2]

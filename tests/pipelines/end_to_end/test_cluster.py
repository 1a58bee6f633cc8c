"""The same pipeline on a Ray cluster of several nodes that was there before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline, write_pipeline

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
            asked = pipeline.run(f"cluster.address={address}", "train.lr=1e-4", "train.resources.cpus_per_worker=3")
        finally:
            cluster.communicate("")
    assert tokens == unbroken.record("tokenize")["output"]
    for name in ("final_train_loss", "final_valid_loss"):
        assert trained[name] == unbroken.record("train")["output"][name]
    assert asked.code == 1, asked.output
    assert "cpus_per_worker" in asked.output or "CPU" in asked.output

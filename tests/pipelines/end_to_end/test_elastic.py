"""A training that loses a machine and gets another one, within one command, on a real cluster of several raylets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipelines.engine.event_log import read_events
from pipelines.engine.events import AttemptLost, Budget, Event, Noted
from pipelines.engine.runs import list_runs
from pipelines.storage import open_storage
from tests.pipelines.end_to_end.tiny_pipeline import TinyPipeline, kill_tree, wait_until, write_pipeline

pytestmark = pytest.mark.slow

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    else:
        nodes.append(cluster.add_node(num_cpus=1))
    print("done", flush=True)
"""
SETTINGS = (
    "train.global_batch_size=12",
    "train.micro_batch_size=4",
    "train.max_steps=400",
    "train.checkpoint_every_steps=10",
    "train.lr=1e-4",
)
ELASTIC = ("train.resources.num_workers=3", "train.resources.min_workers=1", "train.grow_after_s=0")


@pytest.mark.timeout(1500)
def test_a_lost_machine_shrinks_the_group_and_a_new_one_grows_it(tmp_path: Path) -> None:
    unbroken = training_alone(tmp_path / "unbroken")
    finished = unbroken.run(*SETTINGS, "train.resources.num_workers=1")
    assert finished.code == 0, finished.output
    pipeline = training_alone(tmp_path / "elastic")
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        run = pipeline.start("run", str(pipeline.file), f"cluster.address={address}", *SETTINGS, *ELASTIC)
        try:
            wait_until(lambda: len(pipeline.points("train/loss", "train")) > 12, run)  # behind the first checkpoint
            tell(cluster, "kill")
            wait_until(lambda: bool(changes_of_group(pipeline)), run)
            seen = len(pipeline.points("train/loss", "train"))
            wait_until(lambda: len(pipeline.points("train/loss", "train")) > seen, run)
            with stopped(training_workers(cluster)):  # so that the machine is there before the last step, however slow
                tell(cluster, "add")
            output = run.communicate(timeout=900)[0]
        finally:
            if run.poll() is None:
                kill_tree(run)
            cluster.communicate("")
    assert run.returncode == 0, output
    history = json.loads((pipeline.artifact("train") / "history.json").read_text())
    steps, sizes = zip(*history["train/num_workers"], strict=True)
    assert list(steps) == list(range(1, 401))
    assert [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before] == [3, 2, 3]
    lost = [event for event in events_of(pipeline) if isinstance(event, AttemptLost)]
    assert [event.budget for event in lost] == [Budget.LOST_RETRIES], "growing uses up no retry"
    shrunk, grown = changes_of_group(pipeline)
    assert "on 2 workers instead of 3: the cluster has room for no more" in shrunk
    assert "on 3 workers instead of 2: there is room for more" in grown
    assert grown in " ".join(output.split())
    for name in ("final_train_loss", "final_valid_loss"):
        expected = unbroken.record("train")["output"][name]
        assert pipeline.record("train")["output"][name] == pytest.approx(expected, rel=1e-4)
    assert pipeline.record("train")["output"]["tokens_seen"] == unbroken.record("train")["output"]["tokens_seen"]


def training_alone(folder: Path) -> TinyPipeline:
    """The tiny pipeline without what follows training."""
    pipeline = write_pipeline(folder)
    pipeline.file.write_text(pipeline.file.read_text().partition("  evaluate:")[0])
    return pipeline


def events_of(pipeline: TinyPipeline) -> list[Event]:
    """What happened in the one run."""
    (found,) = list_runs(open_storage(pipeline.storage))
    return [event for _, event in read_events(found.storage, found.events_relpath)]


def changes_of_group(pipeline: TinyPipeline) -> list[str]:
    """What was told of them while stages ran; other notes are told, too."""
    told = [event.text for event in events_of(pipeline) if isinstance(event, Noted)]
    return [text for text in told if "workers instead of" in text]


def training_workers(cluster: subprocess.Popen[str]) -> list[psutil.Process]:
    """Those of Ray Train on the cluster's machines."""
    found = psutil.Process(cluster.pid).children(recursive=True)
    workers = [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2, [process.cmdline() for process in found]
    return workers


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """Within it they do nothing."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def tell(cluster: subprocess.Popen[str], what: str) -> None:
    """Have the cluster lose or get a machine, and wait until it has."""
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    cluster.stdin.write(f"{what}\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline().strip() == "done"

"""Five architectures with foreach on a Ray cluster of one node, of two, and of two of which one is killed.

    python -m benchmarks.parallel_stages [--steps N]

Each node is a raylet of its own on this machine with one CPU; each training asks for one. So one node trains the five
one after the other, two nodes train two at a time. In the third run the raylet of one node is killed (SIGKILL) while
both train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipelines.engine.event_log import Entry, read_events
from pipelines.engine.events import AttemptLost, Started
from pipelines.engine.runs import list_runs
from pipelines.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1800
PATTERNS = ("bmojo*2", "bmojo_f*2", "mamba2*2", "swa*2", "attention*2")
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(int(sys.argv[1]))]
print(cluster.address, flush=True)
if sys.stdin.readline():
    cluster.remove_node(nodes[-1], allow_graceful=False)
    sys.stdin.read()
"""
PIPELINE = """
name: five
storage: runs
tracking: {{kind: mlflow, system_metrics: false}}
stages:
  tokenizer: {{kind: tokenizer, source: &source {{kind: python_stdlib}}, vocab_size: 2048}}
  tokens: {{kind: tokenize, needs: [tokenizer], source: *source, seq_len: 256, validation_fraction: 0.02}}
  train:
    kind: train
    needs: [tokens]
    foreach: {{model: {{{models}}}}}
    model: {{d_model: 128, num_heads: 2, window_size: 64, chunk_size: 32, num_eidetic: 16}}
    global_batch_size: 8
    micro_batch_size: 8
    max_steps: {steps}
    warmup_steps: 5
    checkpoint_every_steps: 20
    validation_batches: 2
"""


def write_pipeline(folder: Path, steps: int) -> Path:
    """The pipeline file, in a folder of its own."""
    models = ", ".join(f'{pattern.partition("*")[0]}: {{pattern: "{pattern}"}}' for pattern in PATTERNS)
    file = folder / "five.yaml"
    file.write_text(PIPELINE.format(models=models, steps=steps))
    return file


def trainings_of(folder: Path) -> list[Entry]:
    """Events about training so far."""
    runs = list_runs(open_storage(folder / "runs"))
    entries = [entry for run in runs for entry in read_events(run.storage, run.events_relpath)]
    return [entry for entry in entries if str(getattr(entry.event, "stage", "")).startswith("train")]


def measure(num_nodes: int, steps: int, kill: bool, folder: Path) -> None:
    """Run the pipeline once and print a line."""
    command = [sys.executable, "-c", CLUSTER, str(num_nodes)]
    file = write_pipeline(folder, steps)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        run = [sys.executable, "-m", "pipelines", "run", str(file), f"cluster.address={address}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(run, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        killed = not kill
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(1.0)
            started = [entry for entry in trainings_of(folder) if isinstance(entry.event, Started)]
            if not killed and len(started) >= num_nodes:
                time.sleep(15)  # both train by then
                cluster.stdin.write("kill\n")
                cluster.stdin.flush()
                killed = True
        process.kill()
        cluster.communicate("")
    events = [entry.event for entry in trainings_of(folder)]
    starts = [event for event in events if isinstance(event, Started)]
    lost = [event for event in events if isinstance(event, AttemptLost)]
    ends = [record for record in folder.glob("runs/artifacts/train/*/record.json")]
    seconds = [json.loads(record.read_text())["duration_s"] for record in ends]
    first, last = starts[0].at, events[-1].at
    print(
        f"{num_nodes} node{'s' if num_nodes > 1 else ''}{', one killed' if kill else ''}: exit {process.returncode}; "
        f"{len(ends)} trained, {len(lost)} attempts lost; training from {first[11:19]} to {last[11:19]}, "
        f"{sum(seconds):.0f} s of work",
        flush=True,
    )


def main() -> None:
    """One node, two nodes, two nodes of which one is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    for num_nodes, kill in ((1, False), (2, False), (2, True)):
        with tempfile.TemporaryDirectory() as folder:
            measure(num_nodes, arguments.steps, kill, Path(folder))


if __name__ == "__main__":
    main()

"""What tracking costs a training step: `python -m benchmarks.tracking_cost`.

One small model is trained with every step logged (the default is every tenth): without a tracker, with a real MLflow
server, with one behind a proxy that holds every request for two seconds, and with an address where nobody answers. The
four take turns; a figure is the fastest tenth of a training's steps, which other work on the machine disturbs least,
then the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_STEPS = 20  # not counted: caches fill, the allocator finds its size
PIPELINE = """
name: cost
storage: runs
stages:
  tokenizer: {{kind: tokenizer, source: &source {{kind: python_stdlib}}, vocab_size: 2048}}
  tokens: {{kind: tokenize, needs: [tokenizer], source: *source, seq_len: 256, validation_fraction: 0.02}}
  train:
    kind: train
    needs: [tokens]
    model: {{pattern: bmojo*2, d_model: 128, num_heads: 2, window_size: 64, chunk_size: 32, num_eidetic: 16}}
    global_batch_size: 2
    micro_batch_size: 2
    max_steps: {steps}
    log_every_steps: 1
    checkpoint_every_steps: {steps}
"""

TRAIN = """
import sys
from pipelines.loading import load_pipeline
from pipelines.ray_cluster import RayCluster
from pipelines.session import open_pipeline
from pipelines.engine.scheduler import run_pipeline
from pipelines.tracking.config import targets_of
from pipelines.tracking.environment import quiet_environment
from pipelines.tracking.run_tracking import TrackingOptions

quiet_environment()
uri, seed = sys.argv[1:]
tracking = [f"tracking={{kind: mlflow, uri: '{uri}'}}"] if uri else []
config = load_pipeline("cost.yaml", [*tracking, f"train.seed={seed}"])
pipeline = open_pipeline(config)
targets = targets_of(config.tracking, pipeline.storage) if uri else ()
cluster = RayCluster(config.cluster, config.stages.values(), pipeline.storage.url)
result = run_pipeline(pipeline, TrackingOptions(targets, system_metrics=False, drain_s=0), cluster)
sys.exit(result.failure and result.failure.text)
"""
"""As `bmojo run`, which always has a tracker."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A server with a store of its own, once it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    process = subprocess.Popen(
        [*command, *store], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    for _ in range(600):
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return process
        time.sleep(0.2)
    raise TimeoutError(f"no MLflow server at port {port} after two minutes")


def serve_slowly(port: int, behind: int, delay_s: float) -> None:
    """A proxy: what a client sends reaches the server `delay_s` later."""

    def forward(source: socket.socket, target: socket.socket, wait_s: float) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(wait_s)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        listener = socket.create_server(("127.0.0.1", port))
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", behind))
            threading.Thread(target=forward, args=(client, server, delay_s), daemon=True).start()
            threading.Thread(target=forward, args=(server, client, 0.0), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def step_s(folder: Path, uri: str, seed: int, tokens_per_step: int) -> float:
    """Seconds of a step of one training: nine of ten took longer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", TRAIN, uri, str(seed)],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (trained,) = folder.glob("runs/artifacts/train/*")
    history = json.loads((trained / "history.json").read_text())
    shutil.rmtree(trained)
    shutil.rmtree(folder / "runs" / "runs")
    rates = [rate for step, rate in history["train/tokens_per_s"] if step > FIRST_STEPS]
    return tokens_per_step / statistics.quantiles(rates, n=10)[-1]


def main() -> None:
    """Print a row per form of tracking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cost.yaml").write_text(PIPELINE.format(steps=arguments.steps))
        real, slow, dead = free_port(), free_port(), free_port()
        server = start_mlflow(folder, real)
        try:
            serve_slowly(slow, real, 2.0)
            uris = {"off": ""} | {
                form: f"http://127.0.0.1:{port}" for form, port in (("on", real), ("slow", slow), ("dead", dead))
            }
            measured: dict[str, list[float]] = {form: [] for form in uris}
            for number in range(arguments.rounds):
                for form, uri in uris.items():
                    measured[form].append(step_s(folder, uri, number, tokens_per_step=2 * 256))
                    print(f"round {number + 1} of {arguments.rounds}, {form}: a step {1e3 * measured[form][-1]:.2f} ms")
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    print("tracking   ms per step  against off, per round")
    for form, seconds in measured.items():
        ratios = [100 * (one / off - 1) for one, off in zip(seconds, measured["off"], strict=True)]
        print(
            f"{form:9} {1e3 * statistics.median(seconds):10.2f}  {statistics.median(ratios):+.1f} % "
            f"({min(ratios):+.1f} to {max(ratios):+.1f})"
        )


if __name__ == "__main__":
    main()

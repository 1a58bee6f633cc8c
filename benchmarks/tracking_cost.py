"""What tracking costs a training step: `python -m benchmarks.tracking_cost`.

One small model is trained with every step logged (the default is every tenth): without a tracker, with a real MLflow
server, with one behind a proxy that holds every request for two seconds, and with an address where nobody answers. The
four take turns; a figure is the median step of a training, then the median over the rounds.
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
tracking: []
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


def step_s(folder: Path, tracking: str, number: int, tokens_per_step: int) -> float:
    """Seconds of the median step of one training."""
    command = [sys.executable, "-m", "pipelines", "run", "cost.yaml", f"tracking={tracking}", f"train.seed={number}"]
    subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    (trained,) = folder.glob("runs/artifacts/train/*")
    history = json.loads((trained / "history.json").read_text())
    shutil.rmtree(trained)
    rates = [rate for step, rate in history["train/tokens_per_s"] if step > FIRST_STEPS]
    return tokens_per_step / statistics.median(rates)


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
            forms = {"off": "[]"} | {
                form: f'{{kind: mlflow, uri: "http://127.0.0.1:{port}", system_metrics: false}}'
                for form, port in (("on", real), ("slow", slow), ("dead", dead))
            }
            measured: dict[str, list[float]] = {form: [] for form in forms}
            for number in range(arguments.rounds):
                for form, tracking in forms.items():
                    measured[form].append(step_s(folder, tracking, number, tokens_per_step=2 * 256))
                    print(f"round {number + 1} of {arguments.rounds}, {form}: {1e3 * measured[form][-1]:.2f} ms a step")
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    print("tracking   ms a step  against off, per round")
    for form, seconds in measured.items():
        ratios = [100 * (one / off - 1) for one, off in zip(seconds, measured["off"], strict=True)]
        print(
            f"{form:9} {1e3 * statistics.median(seconds):10.2f}  {statistics.median(ratios):+.1f} % "
            f"({min(ratios):+.1f} to {max(ratios):+.1f})"
        )


if __name__ == "__main__":
    main()

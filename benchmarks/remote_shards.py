"""Training on two machines with shards in an object store: what has arrived at the first step, the cache, an outage.

    python -m benchmarks.remote_shards CORPUS.jsonl.gz [--outage-s 60]

Two raylets with a cache folder each and an S3 server (moto) on this machine. The same training runs twice; the second
time the server is stopped (SIGSTOP) in the middle. Prints how many shards had been fetched at the first step, how much
each cache held at most beside its limit, and whether both runs end with the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base.errors import UserError
from pipelines import api

ROOT = Path(__file__).resolve().parent.parent
CACHE_BYTES = 1 << 20
STOP_AT_STEP = 40
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
for folder in sys.argv[1:]:
    cluster.add_node(num_cpus=1, resources={"trains": 1}, env_vars={"BMOJO_CACHE_DIR": folder})
print(cluster.address, flush=True)
sys.stdin.read()
"""
PIPELINE = """
name: remote
storage: s3://bucket/{name}
tracking: {{kind: mlflow, uri: "sqlite:///{folder}/mlflow.db", system_metrics: false}}
stages:
  tokenizer:
    kind: tokenizer
    source: &text {{kind: files, paths: [{corpus}]}}
    vocab_size: 2048
    sample_bytes: 4000000
  tokens:
    kind: tokenize
    needs: [tokenizer]
    source: *text
    seq_len: 256
    validation_fraction: 0
    shard_bytes: 65536
  train:
    kind: train
    needs: [tokens]
    data: {{shuffle_block_samples: 128, cache_bytes: {cache_bytes}}}
    model: {{pattern: swa*1, d_model: 64, num_heads: 2, window_size: 64}}
    global_batch_size: 8
    micro_batch_size: 4
    max_steps: 150
    warmup_steps: 10
    log_every_steps: 1
    resources: {{num_workers: 2, custom_per_worker: {{trains: 1}}}}
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """moto as a process, and the requests for shards that it has answered."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = folder / "moto.log"
        port = self.url.rpartition(":")[2]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from moto.server import main; main(['-p', '{port}'])"],
                stdout=log,
                stderr=log,
            )

    def fetched(self, name: str) -> set[str]:
        """The shards of a storage that were read."""
        return set(re.findall(rf'"GET /bucket/{name}/(\S+\.mds)', self._log.read_text(errors="replace")))


class CacheWatch(threading.Thread):
    """The most that the shards in each cache took, looked at every few milliseconds."""

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(daemon=True)
        self.most = dict.fromkeys(folders, 0)
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            for folder in self.most:
                total = 0
                for path in (folder / "shards").glob("*"):
                    if path.suffix in (".mds", ".part"):
                        try:
                            total += path.stat().st_size
                        except FileNotFoundError:
                            continue
                self.most[folder] = max(self.most[folder], total)
            time.sleep(0.02)


@contextmanager
def cluster(caches: list[Path]) -> Iterator[str]:
    """Two raylets; their address."""
    command = [sys.executable, "-c", CLUSTER, *map(str, caches)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("")


def step_of(storage: str) -> int:
    """The step that training has reached; 0 before the first, or before there is a run."""
    try:
        return api.status(api.find_run(api.open_storage(storage))).stage("train").done or 0
    except UserError:
        return 0


def measure(name: str, corpus: Path, server: Server, folder: Path, outage_s: float) -> str:
    """Run the pipeline once. Returns the digest of the weights."""
    caches = [folder / f"{name}-cache-{number}" for number in range(2)]
    file, storage = folder / f"{name}.yaml", f"s3://bucket/{name}"
    file.write_text(PIPELINE.format(name=name, corpus=corpus, cache_bytes=CACHE_BYTES, folder=folder))
    watch = CacheWatch(caches)
    watch.start()
    with cluster(caches) as address:
        command = [sys.executable, "-m", "pipelines", "run", str(file), "--restarts", "3", f"cluster.address={address}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        start = time.monotonic()
        with open(folder / f"{name}.log", "w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        at_first_step: int | None = None
        stopped = outage_s == 0
        while process.poll() is None:
            time.sleep(0.5)
            step = step_of(storage)
            if at_first_step is None and step:
                at_first_step = len(server.fetched(name))
            if not stopped and step >= STOP_AT_STEP:
                stopped = True
                server.process.send_signal(signal.SIGSTOP)
                time.sleep(outage_s)
                server.process.send_signal(signal.SIGCONT)
        seconds = time.monotonic() - start
    watch.is_over = True
    watch.join()
    if process.returncode:
        print((folder / f"{name}.log").read_text())
        raise SystemExit(1)
    output = subprocess.run(
        [sys.executable, "-m", "pipelines", "output", "tokens", "--storage", storage, "--json"],
        capture_output=True, text=True, env=environment,
    ).stdout  # fmt: skip
    artifact = json.loads(output)["artifact"]
    import fsspec

    files = fsspec.filesystem("s3")
    num_shards = len(files.glob(f"{artifact}/train/*/*.mds"))
    (weights,) = files.glob(f"{storage}/artifacts/train/*/model/model.safetensors")
    digest = hashlib.sha256(files.cat_file(weights)).hexdigest()
    fetched = len(server.fetched(name))
    print(
        f"{name}: exit {process.returncode} after {seconds:.0f} s; {at_first_step} of {num_shards} shards had arrived "
        f"at the first step that was seen, {fetched} at the end; caches held at most "
        f"{', '.join(f'{most:,}' for most in watch.most.values())} of {CACHE_BYTES:,} bytes; weights {digest[:12]}",
        flush=True,
    )
    return digest


def main() -> None:
    """Once undisturbed, once with an outage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--outage-s", type=float, default=60.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name))
        os.environ.update(
            AWS_ENDPOINT_URL=server.url, AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing-only",
            AWS_DEFAULT_REGION="us-east-1",
        )  # fmt: skip
        try:
            import s3fs

            for _ in range(100):
                try:
                    s3fs.S3FileSystem().mkdir("bucket")
                    break
                except OSError:
                    time.sleep(0.3)
            corpus = arguments.corpus.resolve()
            same = {
                measure("undisturbed", corpus, server, Path(name), 0),
                measure("outage", corpus, server, Path(name), arguments.outage_s),
            }
            print("same weights" if len(same) == 1 else "DIFFERENT weights")
        finally:
            server.process.kill()


if __name__ == "__main__":
    main()

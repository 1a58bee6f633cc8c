"""Where experiments run: on this machine with a cluster of its own, or on three raylets with S3 storage."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Literal

from pipelines.storage import Storage, open_storage
from tests.faults.processes import MARK, end_all, victims
from tests.pipelines.tracking.mlflow_server import free_port

Where = Literal["local", "cluster"]
CLUSTER_MARK = "cluster"
TTL_S = 10.0  # of leases: faults are as long in terms of it as minutes are in terms of the usual 60 s

_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-only-secret"}
_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "gcs_server_port": int(sys.argv[1])})
cluster.add_node(num_cpus=2)
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.read()
"""
_START_S = 120.0


def environment(mark: str, folder: Path) -> dict[str, str]:
    """Variables of every process that belongs to `mark`, with temporary files and caches in `folder`."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_", "BMOJO_", "RAY_"))
    }
    temporary = folder / "t"  # short: Ray keeps its sockets there
    temporary.mkdir(parents=True, exist_ok=True)
    return kept | {
        MARK: mark,
        "BMOJO_CACHE_DIR": str(folder / "cache"),
        "BMOJO_LEASE_TTL_S": f"{TTL_S:g}",
        "BMOJO_STORAGE_RETRY_S": f"{TTL_S:g}",
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else Ray's workers starve beside other work of this machine
        "TMPDIR": str(temporary),
    }


class Local:
    """Storage in a folder; every command starts a Ray cluster of its own."""

    where: Where = "local"

    def environment(self, mark: str, folder: Path) -> dict[str, str]:
        """Of the commands of one experiment."""
        return environment(mark, folder)

    def storage(self, name: str, folder: Path) -> Storage:
        """That of one experiment, as this process reaches it."""
        return open_storage(folder / "runs")

    def arguments(self, storage: Storage) -> list[str]:
        """Overrides of the pipeline file."""
        return [f"storage={storage.url}"]

    def make_ready(self) -> None:
        """Before an experiment."""

    def close(self) -> None:
        """After the last one."""


class S3:
    """An object store: moto keeps the objects, and a front that can be broken or killed is what clients see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store_port, self._front_port = free_port(), free_port()
        self.store_url = f"http://127.0.0.1:{self._store_port}"
        self.front_url = f"http://127.0.0.1:{self._front_port}"
        self._store = self._start(f"from moto.server import main; main(['-p', '{self._store_port}'])")
        _wait_for_port(self._store_port)
        self._front: subprocess.Popen[str] | None = None
        self.start_front()

    def start_front(self) -> None:
        """Start the front, again if it was killed."""
        if self._front is None or self._front.poll() is not None:
            self._front = self._start(
                f"from tests.faults.s3_front import main; main({self._front_port}, {self.store_url!r})"
            )
            _wait_for_port(self._front_port)

    def kill_front(self) -> None:
        """SIGKILL: connections are reset, new ones are refused."""
        assert self._front is not None
        self._front.kill()
        self._front.wait()

    def set_fault(self, fault: str) -> None:
        """What happens to requests from now on (FaultyProxy); "" passes them on."""
        assert self._front is not None
        assert self._front.stdin is not None
        print(fault, file=self._front.stdin, flush=True)

    def close(self) -> None:
        """End both."""
        for process in (self._front, self._store):
            if process is not None:
                process.kill()
                process.wait()

    def _start(self, code: str) -> subprocess.Popen[str]:
        with open(self._folder / "s3.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
            )


class RayNodes:
    """Three raylets and a head on fixed addresses, in a process of their own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._process: subprocess.Popen[str] | None = None

    def make_whole(self) -> None:
        """Have all nodes running: those that an experiment killed are started again, as whoever owns them would."""
        if self._process is not None:
            raylets, heads = victims(CLUSTER_MARK, "raylet"), victims(CLUSTER_MARK, "gcs")
            if (len(raylets), len(heads)) == (3, 1):
                return
            self.close()
        with open(self._folder / "cluster.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CLUSTER, str(self._port)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment,
            )  # fmt: skip
        assert self._process.stdout is not None
        _line(self._process.stdout, "the cluster")

    def close(self) -> None:
        """End all of it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        end_all(CLUSTER_MARK)


class ThreeRaylets:
    """Commands that join a cluster that was there before, and keep everything in an object store."""

    where: Where = "cluster"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.s3 = S3(folder)
        os.environ.update(_CREDENTIALS, AWS_ENDPOINT_URL=self.s3.store_url)  # of this process: faults are not for it
        self._shared = environment(CLUSTER_MARK, folder) | self._aws()
        self.nodes = RayNodes(folder, self._shared)

    def _aws(self) -> dict[str, str]:
        return _CREDENTIALS | {"AWS_ENDPOINT_URL": self.s3.front_url}

    def environment(self, mark: str, folder: Path) -> dict[str, str]:
        """Of the commands of one experiment; they share this machine's caches with the raylets."""
        cache = {"BMOJO_CACHE_DIR": self._shared["BMOJO_CACHE_DIR"]}
        return environment(mark, folder) | self._aws() | cache

    def storage(self, name: str, folder: Path) -> Storage:
        """A bucket of its own."""
        import s3fs

        bucket = f"faults-{name}"
        s3fs.S3FileSystem().mkdir(bucket)
        return open_storage(f"s3://{bucket}/runs")

    def arguments(self, storage: Storage) -> list[str]:
        """Overrides of the pipeline file."""
        return [f"storage={storage.url}", f"cluster.address={self.nodes.address}"]

    def make_ready(self) -> None:
        """Start again what the last experiment killed."""
        self.s3.start_front()
        self.s3.set_fault("")
        self.nodes.make_whole()

    def close(self) -> None:
        """After the last experiment."""
        self.nodes.close()
        self.s3.close()


Place = Local | ThreeRaylets


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"Nothing listens on port {port} after {_START_S:.0f} s.")


def _line(stream: IO[str], what: str) -> str:
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(_START_S)
    if not found or not found[0]:
        raise TimeoutError(f"{what} did not start in {_START_S:.0f} s; see its log.")
    return found[0].strip()

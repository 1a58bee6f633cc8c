"""What `bmojo submit` sends, as a stand-in for the dashboard gets it. A real one is in end_to_end/test_submit.py."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.submit.environment import FILE

SECRET = "a-value-that-nobody-may-see"
PIPELINE = """\
name: mine
storage: {storage}
cluster: {{address: "head:6379"}}
stages:
  tokenizer: {{kind: tokenizer, source: {{kind: files, paths: [texts/a.txt]}}, vocab_size: 512}}
"""


@dataclass
class Received:
    """What a dashboard was sent."""

    packages: dict[str, bytes] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    nodes: tuple[str, ...] = ("198.51.100.7",)


class Handler(http.server.BaseHTTPRequestHandler):
    """The parts of the dashboard that are needed."""

    received: Received

    def do_GET(self) -> None:
        received = self.received
        received.tokens.add(self.headers["Authorization"])
        if self.path == "/api/version":
            self.answer({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})
        elif self.path.startswith("/api/v0/nodes"):
            nodes = [
                {"node_id": str(number), "node_ip": ip, "is_head_node": number == 0, "state": "ALIVE",
                 "state_message": None, "node_name": ip, "resources_total": {}, "labels": {}}
                for number, ip in enumerate(received.nodes)
            ]  # fmt: skip
            listed = {"total": len(nodes), "num_after_truncation": len(nodes), "num_filtered": len(nodes),
                      "result": nodes, "partial_failure_warning": "", "warnings": None}  # fmt: skip
            self.answer({"result": True, "msg": "", "data": {"result": listed}})
        elif self.path.startswith("/api/packages"):
            self.answer({}, 404)
        elif self.path.endswith("/logs"):
            self.answer({"logs": "Running entrypoint for job\nmine-0a1b2c3d in s3://bucket/runs\n"})
        else:
            self.answer({"type": "SUBMISSION", "status": "RUNNING", "entrypoint": ""})

    def do_PUT(self) -> None:
        self.received.packages[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.jobs.append(job)
        self.answer({"job_id": job["submission_id"], "submission_id": job["submission_id"]})

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def received() -> Received:
    return Received()


@pytest.fixture
def url(received: Received) -> Iterator[str]:
    handler = type("OneHandler", (Handler,), {"received": received})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def submit(folder: Path, storage: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """From folder/elsewhere, a pipeline in folder/project that reads elsewhere/texts."""
    for name in ("project", "elsewhere/texts"):
        (folder / name).mkdir(parents=True)
    (folder / "project/mine.yaml").write_text(PIPELINE.format(storage=storage))
    (folder / "elsewhere/texts/a.txt").write_text("a text")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "pipelines", "submit", "../project/mine.yaml", *arguments],
        cwd=folder / "elsewhere", capture_output=True, text=True,
        env={**kept, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "RAY_AUTH_MODE": "token",
             "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef", "COLUMNS": "200", **variables},
    )  # fmt: skip


def test_what_is_sent(tmp_path: Path, url: str, received: Received) -> None:
    ended = submit(
        tmp_path, "s3://bucket/runs", "tokenizer.vocab_size=600", "--env", "MINE_PASSWORD", "--json",
        RAY_ADDRESS=url, MINE_PASSWORD=SECRET, MLFLOW_TRACKING_URI="http://mlflow",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (job,) = received.jobs
    assert json.loads(ended.stdout) == {
        "job": job["submission_id"], "address": url, "run": "mine-0a1b2c3d", "storage": "s3://bucket/runs",
    }  # fmt: skip
    assert "set here, and not shipped: MLFLOW_TRACKING_URI" in ended.stderr
    assert SECRET not in json.dumps(job) + ended.stdout + ended.stderr
    assert job["entrypoint"].endswith(
        "run --restarts 10 ../project/mine.yaml tokenizer.vocab_size=600 cluster.address=auto"
    )
    assert job["runtime_env"]["worker_process_setup_hook"] == "pipelines.submit.environment.load"
    assert received.tokens == {None, "Bearer 0123456789abcdef0123456789abcdef"}  # none where it is only looked for
    (package,) = received.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        names = set(archive.namelist())
        assert json.loads(archive.read(FILE)) == {"MINE_PASSWORD": SECRET}
    assert {name for name in names if name.startswith("job/")} == {
        "job/project/mine.yaml", "job/elsewhere/texts/a.txt",
    }  # fmt: skip


@pytest.mark.ci
def test_a_relative_storage_is_taken_only_if_all_nodes_are_this_machine(
    tmp_path: Path, url: str, received: Received
) -> None:
    ended = submit(tmp_path / "1", "runs", "--address", url, RAY_ADDRESS="http://127.0.0.1:1")
    assert ended.returncode == 1
    assert "storage=runs is a relative path" in ended.stderr
    received.nodes = ("127.0.0.1", "198.51.100.7")
    assert submit(tmp_path / "2", "runs", "--address", url).returncode == 1
    assert not received.jobs
    received.nodes = ("127.0.0.1",)
    ended = submit(tmp_path / "3", "runs", "--address", url)
    assert ended.returncode == 0, ended.stderr
    assert f"storage={tmp_path}/3/elsewhere/runs" in received.jobs[0]["entrypoint"]
    assert "worker_process_setup_hook" not in received.jobs[0]["runtime_env"]
    assert "run mine-0a1b2c3d. This terminal may be closed." in ended.stdout

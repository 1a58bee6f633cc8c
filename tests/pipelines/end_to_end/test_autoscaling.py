"""The same pipeline on a cluster that has no machine for work until somebody asks for one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from tests.pipelines.end_to_end.tiny_pipeline import write_pipeline
from tests.pipelines.waiting import wait_until

pytestmark = pytest.mark.slow

# Ray's autoscaler and its raylets are real; its provider of machines starts them all on this one.
PROVIDER = {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True}
CONFIG = {
    "cluster_name": "grows",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")},
    **{name: [] for name in ("rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
}


@pytest.fixture
def growing_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head without CPUs, and of an autoscaler that may add two machines with one each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({**CONFIG, "provider": {**PROVIDER, "gcs_address": address}}))
    sessions = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path, for sockets
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", f"--autoscaling-config={file}", "--num-cpus=0",
        f"--port={port}", f"--temp-dir={sessions}", "--include-dashboard=false", "--disable-usage-stats", "--block",
    ]  # fmt: skip
    environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    log = tmp_path / "head.log"
    with open(log, "wb") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until(lambda: head.poll() is not None or "Ray runtime started" in log.read_text())
        assert head.poll() is None, log.read_text()
        yield address
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        for process in psutil.process_iter():  # the machines: they outlive their head for a while
            with suppress(psutil.Error):
                if any(sessions in argument for argument in process.cmdline()):
                    process.kill()
        shutil.rmtree(sessions, ignore_errors=True)


def test_stages_ask_for_the_machines_they_need(tmp_path: Path, growing_cluster: str) -> None:
    pipeline = write_pipeline(tmp_path)
    # One worker: the machines share a folder of Ray's here, and one that joins unpacks our packages once more.
    finished = pipeline.run(f"cluster.address={growing_cluster}", "tokens.resources.num_workers=1")
    assert finished.code == 0, finished.output
    logs = {log.name.partition(".")[0]: log.read_text() for log in pipeline.storage.glob("runs/*/logs/*.log")}
    assert "Waiting for machines" in logs["tokenizer"], "there was none"
    assert "2 training workers ask for 1 CPU each, and the cluster has room for 1 of them" in logs["train"]
    assert pipeline.record("train")["output"]["steps"] == 16

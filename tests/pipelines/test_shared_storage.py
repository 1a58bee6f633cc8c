"""Nodes that do not see the storage are named before a stage starts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines import shared_storage
from tests.pipelines.end_to_end.tiny_pipeline import TIMEOUT_S

# Raylets are real. The last one has a mount namespace of its own, in which the storage is another disk.
CLUSTER = """
import subprocess, sys
import ray
from ray.cluster_utils import Cluster

storage = sys.argv[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --node-name=blind --block"
private = f"mount -t tmpfs none {storage} && exec {start} --num-cpus=1 --disable-usage-stats"
blind = subprocess.Popen(["unshare", "-rm", "sh", "-c", private], stdout=subprocess.DEVNULL)
ray.init(cluster.address, log_to_driver=False)
while len([node for node in ray.nodes() if node["Alive"]]) < 3:
    assert blind.poll() is None, "the third node ended"
print(cluster.address, flush=True)
sys.stdin.read()
blind.terminate()
blind.wait()
ray.shutdown()
cluster.shutdown()
"""
PIPELINE = """
name: blind
storage: {storage}
stages:
  nothing: {{kind: python, call: nothing:nothing}}
"""


def can_have_a_mount_of_its_own() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return sys.platform == "linux" and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_have_a_mount_of_its_own(), reason="mount namespaces cannot be made here")
def test_a_run_names_the_node_that_has_a_disk_of_its_own(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    (tmp_path / "nothing.py").write_text("def nothing(stage): pass\n")
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.format(storage=storage))
    command = [sys.executable, "-c", CLUSTER, str(storage)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        run = [sys.executable, "-m", "pipelines", "run", str(tmp_path / "pipeline.yaml"), f"cluster.address={address}"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=TIMEOUT_S)
        cluster.communicate("")
    assert done.returncode == 1, done.stdout + done.stderr
    error = " ".join(done.stderr.split())
    assert "1 of 3 nodes of the cluster do not see the files that this machine writes to" in error
    assert ": blind (" in error
    assert "s3://bucket/prefix" in error
    assert not list(storage.glob(".probe-*"))
    assert not list(storage.glob("artifacts/python/*/record.json"))


def nodes(*names: str) -> list[dict[str, object]]:
    return [
        {"NodeID": name, "NodeName": "10.0.0.1", "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": name}
        | {"Alive": name != "dead"}
        for name in names
    ]


@pytest.mark.parametrize(
    ("there", "found", "named"),
    [
        (("a",), {"a": None}, None),
        (("a", "dead"), {"a": None}, None),
        (("a", "b"), {"a": "probe", "b": "probe"}, None),
        (("a", "b"), {"a": "probe", "b": None}, "1 of 2 nodes .*: b \\(10.0.0.1\\)"),
        (("c", "a", "b"), {"a": None, "b": "other", "c": "probe"}, "2 of 3 nodes .*: a \\(.*\\), b \\("),
    ],
)
def test_nodes_that_find_nothing_or_something_else_are_named(
    there: tuple[str, ...],
    found: dict[str, str | None],
    named: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def differ(asked: dict[str, str], path: str, content: bytes) -> list[str]:
        assert Path(path).read_bytes() == content
        assert "dead" not in asked
        return [name for node, name in asked.items() if found[node] != "probe"]

    monkeypatch.setattr("ray.nodes", lambda: nodes(*there))
    monkeypatch.setattr(shared_storage, "_nodes_that_differ", differ)
    if named is None:
        shared_storage.check_shared_storage(str(tmp_path))
    else:
        with pytest.raises(UserError, match=named):
            shared_storage.check_shared_storage(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_object_store_is_seen_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: nodes("a", "b"))
    shared_storage.check_shared_storage("s3://bucket/prefix")


def test_a_file_may_become_visible_late(tmp_path: Path) -> None:
    path = tmp_path / "probe"
    threading.Timer(0.1, path.write_bytes, [b"content"]).start()
    assert shared_storage.read_probe(str(path)) == b"content"


def test_a_file_that_never_comes_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "_LOOK_S", 0.0)
    assert shared_storage.read_probe(str(tmp_path / "probe")) is None

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.storage import Storage, open_storage
from pipelines.storage.artifact import ArtifactDir


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return request.getfixturevalue("s3_storage") if request.param == "s3" else open_storage(tmp_path / "store")


def test_what_is_written_is_read_listed_and_deleted(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list() == []
    storage.write_json_atomic("a/b.json", {"x": 1})
    storage.write_bytes_atomic("a/c/d.bin", b"\x00\x01")
    assert storage.read_json("a/b.json") == {"x": 1}
    assert storage.read_bytes("a/c/d.bin") == b"\x00\x01"
    assert storage.list("a") == ["b.json", "c"]
    assert set(storage.files_under("a")) == {"b.json", "c/d.bin"}
    assert storage.exists("a/c")
    storage.delete("a/c")
    assert not storage.exists("a/c")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/c/d.bin")
    storage.delete("a/c")


def test_only_one_of_many_threads_creates_a_file(storage: Storage) -> None:
    winners: list[int] = []

    def create(number: int) -> None:
        if storage.create_exclusive("one", str(number).encode()):
            winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert storage.read_bytes("one") == str(winners[0]).encode()


def test_trees_go_there_and_back(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "x.txt").write_text("x")
    (source / "y.txt").write_text("y")
    storage.put_tree(source, "tree")
    storage.get_tree("tree", tmp_path / "copy")
    assert (tmp_path / "copy/deep/x.txt").read_text() == "x"
    assert (tmp_path / "copy/y.txt").read_text() == "y"
    with pytest.raises(FileNotFoundError):
        storage.get_tree("nothing", tmp_path / "other")


def test_a_storage_survives_pickling(storage: Storage) -> None:
    storage.write_bytes_atomic("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


def test_a_missing_bucket_is_named(s3_storage: Storage) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/.*the bucket does not exist"):
        open_storage("s3://no-such-bucket/x").check_writable()


def test_an_unknown_scheme_and_a_missing_driver_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="begins with s4://"):
        open_storage("s4://bucket/x")

    def not_installed(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", not_installed)
    with pytest.raises(UserError, match=r"pip install 'bmojo-pipeline\[s3\]'"):
        open_storage("s3://bucket/x")


def test_paths_cannot_leave_the_storage(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for path in ("../x", "/etc/passwd"):
        with pytest.raises(ValueError, match="not a path inside"):
            storage.read_bytes(path)
    with pytest.raises(ValueError, match="whole storage"):
        storage.delete("")


@pytest.mark.parametrize(
    ("number", "expected", "words"),
    [
        (errno.ENOSPC, InfrastructureError, "no space is left"),
        (errno.EDQUOT, InfrastructureError, "quota"),
        (errno.EIO, InfrastructureError, "EIO"),
        (errno.EACCES, UserError, "not allowed"),
        (errno.EROFS, UserError, "not allowed"),
    ],
)
def test_a_disk_that_takes_nothing_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception], words: str
) -> None:
    storage = open_storage(tmp_path).with_retry_s(0)
    storage.write_bytes_atomic("x", b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected, match=words):
        storage.write_bytes_atomic("x", b"new")
    assert storage.read_bytes("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_where_the_storage_should_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        open_storage(tmp_path / "file" / "store").check_writable()


def test_an_artifact_written_on_one_machine_is_read_on_another(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = ArtifactDir(storage, "artifacts/train/x-1")
    (artifact.local / "checkpoint").mkdir()
    (artifact.local / "checkpoint/weights").write_text("1")
    artifact.publish("checkpoint")
    artifact.write_json("latest.json", {"step": 1})
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "other-machine"))
    other = pickle.loads(pickle.dumps(artifact))
    assert other.exists("checkpoint")
    assert other.listdir() == ["checkpoint", "latest.json"]
    assert (other.fetch("checkpoint") / "weights").read_text() == "1"
    assert ArtifactDir.at(other.url).read_json("latest.json") == {"step": 1}
    with pytest.raises(FileNotFoundError):
        other.fetch("nothing")
    other.delete("checkpoint")
    assert not artifact.exists("checkpoint")


def test_fetching_again_copies_only_what_changed(s3_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_storage.write_bytes_atomic("a/x/1", b"1")
    s3_storage.write_bytes_atomic("a/x/2", b"2")
    artifact = ArtifactDir(s3_storage, "a")
    artifact.fetch("x")
    copied: list[str] = []
    get_file = Storage.get_file
    monkeypatch.setattr(
        Storage, "get_file", lambda self, relpath, local: (copied.append(relpath), get_file(self, relpath, local))
    )
    s3_storage.write_bytes_atomic("a/x/2", b"3")
    assert (artifact.fetch("x") / "2").read_bytes() == b"3"
    assert copied == ["a/x/2"]


def test_engine_imports_leave_heavy_libraries_alone() -> None:
    heavy = "{'ray', 'mlflow', 'torch', 'deepspeed', 'numpy', 's3fs'}"
    code = f"import pipelines.engine.scheduler, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_home_of_nobody_is_the_users_error() -> None:
    with pytest.raises(UserError, match="storage: ~no-such-user/runs: no such user"):
        open_storage("~no-such-user/runs")

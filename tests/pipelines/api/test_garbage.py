"""`bmojo gc`: what it finds, what it deletes, and what it never touches."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from base.files import usage
from pipelines import api
from pipelines.api.garbage.ray_leftovers import ray_leftovers
from pipelines.engine.events import Status
from pipelines.engine.lease import Lease
from pipelines.engine.process import ProcessIdentity
from pipelines.engine.runs import Run, delete_run
from pipelines.stages.train.ray_folder import new_ray_train_folder
from pipelines.storage import Storage, open_storage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.spool import Spool
from tests.pipelines.api.driving import World
from tests.pipelines.waiting import wait_until

NOW = api.Limits(older_than_s=0)


@pytest.fixture(autouse=True)
def ray_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No folder of anybody else's is looked at. Ray's has a path that is short enough for its sockets."""
    (tmp_path / "T").mkdir()
    with tempfile.TemporaryDirectory(prefix="bmojo-test-", dir="/tmp") as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        monkeypatch.setenv("TMPDIR", str(tmp_path / "T"))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "cache"))
        yield Path(short) / "ray"


def aged(path: Path, days: float) -> Path:
    """The file, or all in the folder, as if it was so old."""
    then = time.time() - days * 86400
    for one in [*path.rglob("*"), path]:
        os.utime(one, (then, then), follow_symlinks=False)
    return path


def found(storage: Storage, limits: api.Limits = NOW) -> dict[str, str]:
    return {item.path: item.what for item in api.find_garbage(storage, limits).report().items}


def delete_all(storage: Storage, limits: api.Limits = NOW) -> api.GarbageReport:
    return api.delete_garbage(api.find_garbage(storage, limits))


def test_artifacts_that_no_run_names(world: World) -> None:
    assert world.run().code == 0
    assert world.run("second.scale=3.0").code == 0
    storage = open_storage(world.storage)
    assert found(storage) == {}
    last = world.latest
    only_its_own = last.stored_state().stages["second"].artifact
    delete_run(last)
    assert found(storage, api.Limits()) == {}, "it is too young"
    assert list(found(storage)) == [f"{world.storage}/{only_its_own}"]
    said = world.bmojo("gc", "--older-than", "0s")
    assert "Nothing was deleted" in said.out
    assert world.bmojo("gc", "--older-than", "0s", "--delete", answer="n\n").code == 1
    assert (world.storage / str(only_its_own)).exists(), "it was only looked at"
    said = world.bmojo("gc", "--older-than", "0s", "--delete", "--json")
    assert said.code == 1
    assert "give --yes" in said.err
    said = world.bmojo("gc", "--older-than", "0s", "--delete", "--yes", "--json")
    assert said.code == 0
    assert said.json["deleted"]
    assert [item["what"] for item in said.json["items"]] == ["artifact"]
    assert said.json["size_bytes"] > 0
    assert not (world.storage / str(only_its_own)).exists()
    assert not list((world.storage / "leases").glob(f"*{Path(str(only_its_own)).name}"))
    assert world.bmojo("gc", "--older-than", "0s", "--json").json["items"] == []
    assert world.run().code == 0
    assert world.bmojo("status", "--json").json["stages"][0]["started_at"], "nothing of the other run was touched"


def test_an_artifact_that_is_being_made_or_that_a_run_names_by_now_stays(world: World) -> None:
    storage = open_storage(world.storage)
    ArtifactDir(storage, "artifacts/steps/first-12345678").write_json("steps/1.json", {})
    with Lease.acquire(storage, "leases/steps-first-12345678", "Artifact x"):
        assert found(storage) == {}
    assert world.run().code == 0
    run = world.latest
    things = api.find_garbage(storage, NOW)
    assert [thing.garbage.what for thing in things.things] == ["artifact"]
    with Lease.acquire(storage, "leases/steps-first-12345678", "Artifact x"):
        report = api.delete_garbage(things)
    assert report.items == ()
    assert "is held by process" in report.notes[0]
    kept = world.storage / str(run.stored_state().stages["second"].artifact)
    moved = world.storage / "elsewhere"
    (world.storage / run.relpath).rename(moved)
    things = api.find_garbage(storage, NOW)
    assert len(things.things) == 3
    moved.rename(world.storage / run.relpath)
    report = api.delete_garbage(things)
    assert [item.path for item in report.items] == [f"{world.storage}/artifacts/steps/first-12345678"]
    assert kept.exists()
    assert sum("a run names it by now" in note for note in report.notes) == 2


def test_what_a_kept_record_refers_to_is_kept(world: World) -> None:
    storage = open_storage(world.storage)
    assert world.run().code == 0
    record = ArtifactDir(storage, str(world.latest.stored_state().stages["second"].artifact))
    referred = ArtifactDir(storage, "artifacts/tokenize/tokens-12345678")
    referred.write_json("tokenizer/x.json", {})
    content = record.read_json("record.json")
    content["output"]["tokenizer"] = record.reference_to(referred, "tokenizer")
    record.write_json("record.json", content)
    assert found(storage) == {}


def test_with_a_damaged_run_no_artifact_is_judged(world: World) -> None:
    assert world.run().code == 0
    storage = open_storage(world.storage)
    next((world.storage / world.latest.events_relpath).iterdir()).write_text("{")
    ArtifactDir(storage, "artifacts/steps/first-12345678").write_json("steps/1.json", {})
    assert found(storage) == {}
    said = world.bmojo("gc", "--older-than", "0s")
    assert said.code == 0
    assert "left alone, because a run is damaged" in said.err


@pytest.mark.slow
def test_what_killed_processes_left_in_a_storage(world: World) -> None:
    driver = world.drive("first.upto=1000", "first.step_s=0.1")
    storage = open_storage(world.storage)
    held = next((world.storage / "artifacts" / "steps").glob("first-*"))
    (held / ".x.json.0123.tmp").write_text("half")
    (world.storage / world.latest.relpath / "journal" / ".y.tmp").write_text("half")
    (world.storage / "mlflow" / ".creating-abc").mkdir(parents=True)
    (world.storage / "mlflow" / ".creating-abc" / "mlflow.db").write_text("half")
    (world.storage / ".bmojo-write-test-0123").write_text("")
    Lease.acquire(storage, "leases/train-gone-12345678", "Artifact x").release()
    Lease.acquire(storage, "runs/empty-12345678/lease", "Run x").release()
    left = {
        f"{world.storage}/mlflow/.creating-abc": "unfinished write",
        f"{world.storage}/.bmojo-write-test-0123": "unfinished write",
        f"{world.storage}/leases/train-gone-12345678": "lease",
        f"{world.storage}/runs/empty-12345678": "run",
    }
    assert found(storage) == left, "and nothing of the live run"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    unfinished = {
        f"{held}/.x.json.0123.tmp": "unfinished write",
        f"{world.storage}/{world.latest.relpath}/journal/.y.tmp": "unfinished write",
    }
    wait_until(lambda: found(storage) == left | unfinished)
    report = delete_all(storage)
    assert report.notes == ()
    assert found(storage) == {}
    assert not any(Path(path).exists() for path in left | unfinished)
    assert api.list_runs(storage)[0].status is Status.RESUMABLE
    assert list((held / "steps").iterdir()), "what it had done is there"


@pytest.mark.ci
def test_garbage_in_an_object_store(s3_storage: Storage) -> None:
    artifact = ArtifactDir(s3_storage, "artifacts/steps/first-12345678")
    artifact.write_json("steps/1.json", {"value": 1})
    Lease.acquire(s3_storage, "leases/steps-first-12345678", "Artifact x").release()
    assert found(s3_storage, api.Limits()) == {}, "the store says that it is young"
    (item,) = api.find_garbage(s3_storage, NOW).report().items
    assert item.path == artifact.url
    assert item.size_bytes > 0
    assert item.age_s is not None
    assert delete_all(s3_storage).notes == ()
    assert not artifact.exists()
    assert not s3_storage.exists("leases")
    assert not artifact.scratch.exists(), "its copy here too"


def test_caches_by_age_and_size(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "runs")
    cache = tmp_path / "cache"
    for name, days in (("verified/ab/old", 40), ("verified/ab/new", 1), ("cpp/kernel.so", 50), ("tuning-x.json", 2)):
        file = cache / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x" * 100)
        aged(file, days)
    copy = cache / "artifacts" / "tokens-12345678-0123456789abcdef"
    copy.mkdir(parents=True)
    (copy / "shard.mds").write_text("y" * 1000)
    aged(copy, 10)
    assert found(storage, api.Limits()) == {str(cache / "verified"): "cache", str(cache / "cpp"): "cache"}
    small = api.Limits(cache_max_bytes=250)
    assert found(storage, small) == {str(cache / name): "cache" for name in ("verified", "cpp")} | {str(copy): "cache"}
    assert delete_all(storage, small).size_bytes == 1200
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["new", "tuning-x.json"]
    (cache / "verified" / "ab" / "used").write_text("z")
    aged(cache / "verified" / "ab" / "used", 40)
    things = api.find_garbage(storage)
    os.utime(cache / "verified" / "ab" / "used")
    api.delete_garbage(things)
    assert (cache / "verified" / "ab" / "used").exists(), "it was used meanwhile"


def test_spools_of_deleted_runs(s3_storage: Storage) -> None:
    kept, gone, other = (Spool(storage, f"runs/{name}") for storage, name in (
        (s3_storage, "kept-12345678"), (s3_storage, "gone-12345678"), (open_storage("s3://other/x"), "far-12345678"),
    ))  # fmt: skip
    for spool in (kept, gone, other):
        spool.journal_dir.mkdir(parents=True)
        (spool.journal_dir / "x.jsonl").write_text("points")
    s3_storage.write_bytes_atomic("runs/kept-12345678/events/000001-000001.json", b"{}")
    assert {path for path, what in found(s3_storage).items() if what == "spool"} == {str(gone.dir)}
    delete_all(s3_storage)
    assert not gone.dir.exists()
    assert kept.dir.exists()
    assert other.dir.exists(), "its storage may have the run"


def test_the_folder_of_a_training_whose_process_is_dead(tmp_path: Path) -> None:
    mine, dead, far = (Path(new_ray_train_folder()) for _ in range(3))
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    identity = ProcessIdentity.of_this_process().model_copy(update={"pid": child.pid, "started_at": 1.0})
    (dead / "owner.json").write_text(identity.model_dump_json())
    unknown = tmp_path / "T" / "bmojo-ray-train-unknown"
    unknown.mkdir()
    (far / "owner.json").write_text(identity.model_copy(update={"boot_id": "another machine"}).model_dump_json())
    (thing,) = ray_leftovers(NOW)
    assert thing.garbage.path == str(dead)
    assert thing.delete() is None
    assert not dead.exists()
    assert all(folder.exists() for folder in (mine, unknown, far))
    assert not list(ray_leftovers(api.Limits()))


def test_the_next_training_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    mine, dead = (Path(new_ray_train_folder()) for _ in range(2))
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    identity = ProcessIdentity.of_this_process().model_copy(update={"pid": child.pid, "started_at": 1.0})
    (dead / "owner.json").write_text(identity.model_dump_json())
    new = Path(new_ray_train_folder())
    assert not dead.exists()
    assert all(folder.exists() for folder in (mine, new))


def test_sessions_of_ray_that_nobody_uses(ray_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, listens, named, young = (ray_folder / f"session_2026-01-0{n}_00-00-00_000000_{n}" for n in (1, 2, 3, 4))
    for session in (dead, listens, named, young):
        (session / "sockets").mkdir(parents=True)
        (session / "logs").mkdir()
        (session / "logs" / "raylet.out").write_text("text")
        if session is not young:
            aged(session, 3)
    (ray_folder / "session_latest").symlink_to(dead)
    monkeypatch.chdir(listens / "sockets")  # a short path
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as left:
        server.bind("raylet")
        server.listen()
        monkeypatch.chdir(dead / "sockets")
        left.bind("raylet")
        left.close()
        for session in (dead, listens):
            aged(session, 3)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(named)])
        try:
            (thing,) = ray_leftovers(NOW)
            assert thing.garbage.path == str(dead)
            assert thing.garbage.size_bytes == usage(dead).size_bytes
            assert thing.delete() is None
        finally:
            process.kill()
            process.wait()
    assert not dead.exists()
    assert not (ray_folder / "session_latest").is_symlink()
    assert all(session.exists() for session in (listens, named, young))


def test_a_run_directory_that_begins_meanwhile_stays(world: World) -> None:
    storage = open_storage(world.storage)
    Lease.acquire(storage, "runs/empty-12345678/lease", "Run x").release()
    things = api.find_garbage(storage, NOW)
    storage.write_bytes_atomic("runs/empty-12345678/events/000001-000001.json", b"{}")
    report = api.delete_garbage(things)
    assert report.items == ()
    assert "it has begun by now" in report.notes[0]
    assert Run(storage, "empty-12345678").exists()

"""`bmojo why`: what stages wait for, why they run, why runs ended so."""

from __future__ import annotations

import signal

import pytest

from pipelines import api
from pipelines.engine.events import Queued
from pipelines.engine.lease import Lease
from pipelines.engine.runs import artifact_lease_relpath
from pipelines.storage import open_storage
from tests.pipelines.api.driving import World
from tests.pipelines.made_runs import made_run


def sentences(world: World, stage: str | None = None) -> str:
    reasons = api.why(world.latest, stage)
    return " ".join([*reasons.sentences, *(text for one in reasons.stages for text in one.sentences)])


def test_a_finished_run_says_what_was_reused_and_what_changed(finished: World) -> None:
    assert "It succeeded at" in sentences(finished)
    assert "It was not run: its result was there, made at" in sentences(finished, "first")
    assert "Changed since the last result: scale: 1.0 -> 3.0." in sentences(finished, "second")
    said = finished.bmojo("why", "second", "--json").json
    assert said["status"] == "SUCCEEDED"
    assert [stage["stage"] for stage in said["stages"]] == ["second"]
    assert "Changed since the last result: scale: 1.0 -> 3.0." in finished.bmojo("why").out


def test_a_failed_run_names_the_stage_its_error_and_what_was_kept_from_starting(world: World) -> None:
    assert world.run("first.fail=user").code == 1
    assert "It failed because first failed." in sentences(world)
    assert "It is FAILED: the text is empty; give another file. Its output: " in sentences(world, "first")
    assert "It needs first (FAILED). The run ended before that was there." in sentences(world, "second")


@pytest.mark.slow
def test_a_killed_driver_and_then_its_successor(world: World) -> None:
    driver = world.drive("first.upto=30", "first.step_s=0.1")
    assert "It is running, driven by process" in sentences(world)
    assert "It has been running since" in sentences(world, "first")
    assert "It needs first (RUNNING)." in sentences(world, "second")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert "It did not end: its driver is gone" in sentences(world)
    assert "bmojo resume steps-" in sentences(world)
    assert "What it did is kept." in sentences(world, "first")
    assert world.run("first.upto=30").code == 0
    assert "an earlier attempt was interrupted; it resumes from there" in sentences(world, "first")


@pytest.mark.slow
def test_cancelled_by_command_and_by_ctrl_c(world: World) -> None:
    driver = world.drive("first.upto=1000", "first.step_s=0.1")
    assert world.bmojo("cancel", "steps", "--json").json["driver"].startswith(f"process {driver.pid}")
    assert driver.wait(60) == 130
    assert "somebody asked for it (bmojo cancel)" in sentences(world)
    driver = world.start("run", world.folder / "steps.yaml", "first.upto=1000", "first.step_s=0.1")
    assert driver.stdout is not None
    while "resuming" not in driver.stdout.readline() and driver.poll() is None:
        pass
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130
    assert "its driver was interrupted (Ctrl-C)" in sentences(world)


def test_a_queued_stage_says_what_it_asks_for_and_who_is_in_its_way(world: World) -> None:
    storage = open_storage(world.storage)
    config = {"stages": {"big": {"kind": "train", "resources": {"num_workers": 4, "gpus_per_worker": 1}}}}
    run = made_run(storage, "queued-1a2b3c4d", config, {"big": "train"})
    log = run.log(2)
    with Lease.acquire(storage, run.lease_relpath, "Run x"):
        log.append(Queued(stage="big", reason="waits for room: asks for 4 x 1 CPU and 1 GPU; the cluster has 2 CPU"))
        said = " ".join(api.why(run, "big").stages[0].sentences)
        assert said == (
            "It waits for room: asks for 4 x 1 CPU and 1 GPU; the cluster has 2 CPU. "
            "Its settings ask for 4 workers with 1 CPU and 1 GPU each."
        )
        with Lease.acquire(storage, artifact_lease_relpath("train", "big", "f" * 64), "Artifact x"):
            said = " ".join(api.why(run, "big").stages[0].sentences)
            assert "Its artifact is being made by process" in said
        assert api.status(run).stage("big").waits_for is not None

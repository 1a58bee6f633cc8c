"""`bmojo resume --all`: what dead drivers left is finished; what lives, failed or is done is left alone."""

from __future__ import annotations

import signal

import pytest

from pipelines import api
from pipelines.api.resuming import ResumedRun, worst_exit_code
from pipelines.engine.events import Ended, Planned, Status
from pipelines.storage import open_storage
from tests.pipelines.api.driving import World

ONE = """\
name: {name}
storage: {storage}
tracking: {{uri: "http://127.0.0.1:9/"}}
stages:
  first: {{kind: steps, upto: 30, step_s: 0.1}}
"""


@pytest.mark.slow
def test_all_that_can_be_resumed_is(world: World) -> None:
    killed = world.drive("first.upto=40", "first.step_s=0.1")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    terminated = world.start("run", world.write("other", ONE))
    assert terminated.stdout is not None
    while "running" not in terminated.stdout.readline():
        assert terminated.poll() is None
    terminated.send_signal(signal.SIGTERM)
    assert terminated.wait(60) == 75
    assert world.run("first.fail=user", "first.upto=2").code == 1
    live = world.start("run", world.write("live", ONE), "first.upto=2000")
    assert live.stdout is not None
    while "running" not in live.stdout.readline():
        assert live.poll() is None
    said = world.bmojo("resume", "--all", "--json")
    assert said.code == 0, said.err
    resumed = {one["run"].rpartition("-")[0]: one["status"] for one in said.json}
    assert resumed == {"steps": "SUCCEEDED", "other": "SUCCEEDED"}
    assert live.poll() is None
    statuses = sorted((row.name, str(row.status)) for row in api.list_runs(open_storage(world.storage)))
    assert statuses == [("live", "RUNNING"), ("other", "SUCCEEDED"), ("steps", "FAILED"), ("steps", "SUCCEEDED")]
    said = world.bmojo("resume", "--all")
    assert said.code == 0
    assert "No run in" in said.out


@pytest.mark.slow
def test_one_that_cannot_be_resumed_keeps_no_other_from_it(world: World) -> None:
    for name in ("gone", "good"):
        driver = world.start("run", world.write(name, ONE))
        assert driver.stdout is not None
        while "running" not in driver.stdout.readline():
            assert driver.poll() is None
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    gone = api.find_run(open_storage(world.storage), "gone")
    info = gone.info()
    stages = {"first": {**info.config["stages"]["first"], "no_such_field": 1}}
    changed = info.model_copy(update={"config": {**info.config, "stages": stages}})
    log = gone.log(9)
    log.append(Planned(event="resumed", info=changed))
    log.append(Ended(status=Status.RESUMABLE, error="no"))
    said = world.bmojo("resume", "--all")
    assert said.code == 1, said.out + said.err
    assert "Another version of this program started the run" in said.out
    assert api.list_runs(open_storage(world.storage), name="good")[0].status is Status.SUCCEEDED


def test_a_run_and_all_exclude_each_other(world: World) -> None:
    said = world.bmojo("resume", "steps", "--all")
    assert said.code == 1
    assert "expected one of the two" in said.err


@pytest.mark.slow
def test_resume_prints_the_status_as_json(world: World) -> None:
    driver = world.drive("first.upto=20", "first.step_s=0.1")
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 75
    said = world.bmojo("resume", "steps", "--json")
    assert said.code == 0, said.err
    assert said.json["status"] == "SUCCEEDED"


def test_the_worst_exit_code() -> None:
    def worst(*codes: int) -> int:
        return worst_exit_code([ResumedRun(run="x", status=Status.FAILED, exit_code=c, error=None) for c in codes])

    assert worst() == 0
    assert worst(0, 75) == 75
    assert worst(75, 130) == 130
    assert worst(130, 1, 75) == 1
    assert worst(1, 70) == 70

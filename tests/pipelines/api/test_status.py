"""`bmojo status` on finished runs, and on a live driver that is then killed."""

from __future__ import annotations

import json
import re
import signal

import pytest

from pipelines import api
from pipelines.engine.events import Status
from pipelines.storage import open_storage
from tests.pipelines.api.driving import World
from tests.pipelines.waiting import wait_until


def test_a_finished_run_as_json(finished: World) -> None:
    said = finished.bmojo("status", "--json")
    assert said.code == 0
    assert said.err == ""
    status = said.json
    assert status["status"] == "SUCCEEDED"
    assert status["exit_code"] == 0
    assert status["driver"] is None
    assert status["resume"] is None
    assert status["links"] == {"MLflow": "http://127.0.0.1:9/"}
    first, second = status["stages"]
    assert first["reused"]
    assert first["attempt"] == 0
    assert first["summary"] == "5 steps, as status shows them"
    assert not second["reused"]
    assert second["attempt"] == 1
    assert second["log"].endswith("/logs/second.000001-1.log")
    assert second["time_s"] > 0


def test_python_and_the_command_say_the_same(finished: World) -> None:
    status = api.status(finished.latest)
    said = finished.bmojo("status", finished.latest.run_id, "--json").json
    for stage in said["stages"]:
        stage["summary"] = None  # this process does not know the kind
    assert json.loads(status.model_dump_json()) == said
    assert status.stage("second").kind == "steps"
    assert [now.status for now in api.watch(finished.latest)] == [Status.SUCCEEDED]


def test_run_prints_the_same_at_its_end(world: World) -> None:
    said = world.bmojo("run", world.folder / "steps.yaml", "--json")
    assert said.code == 0
    assert said.json["status"] == "SUCCEEDED"
    assert "first: running" in said.err
    again = world.bmojo("status", "--json").json
    assert again == said.json


@pytest.mark.slow
def test_a_live_run_has_steps_values_time_left_and_what_waits(world: World) -> None:
    world.drive("first.upto=1000", "first.step_s=0.1")
    wait_until(lambda: api.status(world.latest).stage("first").done is not None, 60)
    status = api.status(world.latest)
    first, second = status.stages
    assert status.status is Status.RUNNING
    assert status.exit_code is None
    assert status.driver is not None
    assert "last seen" in status.driver
    assert first.status is Status.RUNNING
    assert first.total == 1000
    assert first.done
    assert first.values == {"steps/value": first.done}
    assert first.eta_s is not None
    assert 20 < first.eta_s < 1000 * 60, "about 100 s where nothing else runs"
    assert second.status is Status.PENDING
    assert second.waits_for == "needs first (RUNNING)"
    said = world.bmojo("status").out
    assert re.search(r"first +steps +RUNNING +1 +[\d,]+ of 1,000 +value [\d.]+ +\d+ (s|min) ", said)
    assert "second: needs first (RUNNING)" in said
    assert f"logs/{'first.000001-1.log'}" in said


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.slow
def test_watching_ends_when_the_driver_is_killed(world: World, as_json: bool) -> None:
    driver = world.drive("first.upto=1000", "first.step_s=0.1")
    watching = world.start("status", "--watch", *(["--json"] if as_json else []))
    assert watching.stdout is not None
    first_line = watching.stdout.readline()
    driver.send_signal(signal.SIGKILL)
    rest = watching.communicate(timeout=60)[0]
    assert watching.returncode == 75, rest
    if as_json:
        told = [json.loads(line) for line in [first_line, *rest.splitlines()]]
        assert told[0]["status"] == "RUNNING"
        assert told[-1]["status"] == "RESUMABLE"
        assert told[-1]["exit_code"] == 75
        assert told[-1]["resume"].startswith("bmojo resume steps-")
        clocks = ("time_s", "eta_s")
        assert len({json.dumps({k: v for k, v in one.items() if k not in clocks}) for one in told}) == len(told)
    else:
        assert re.match(r"\d\d:\d\d:\d\d first: RUNNING", first_line)
        assert re.search(r"steps-\w+ RESUMABLE: its driver is gone", rest.splitlines()[-1])


@pytest.mark.slow
def test_watching_follows_a_run_to_its_end_and_exits_as_it_does(world: World) -> None:
    driver = world.drive("first.upto=20", "first.step_s=0.1", "second.fail=user")
    watching = world.start("status", "--watch")
    said = watching.communicate(timeout=60)[0]
    assert driver.wait(60) == 1
    assert watching.returncode == 1, said
    assert "second: FAILED - the text is empty" in said
    assert world.bmojo("status", "--watch", "--json").code == 1


def test_the_exit_code_tells_a_bug_from_wrong_input(world: World) -> None:
    assert world.run("first.fail=bug").code == 70
    assert world.bmojo("status", "--json").json["exit_code"] == 70
    assert world.bmojo("status", "--watch").code == 70
    assert world.bmojo("status").code == 0, "without --watch it only says so"


@pytest.mark.slow
def test_ctrl_c_ends_the_watching_and_not_the_run(world: World) -> None:
    driver = world.drive("first.upto=1000", "first.step_s=0.1")
    watching = world.start("status", "--watch")
    assert watching.stdout is not None
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    said = watching.communicate(timeout=60)[0]
    assert watching.returncode == 130
    assert "the run goes on" in said
    assert "error" not in said
    assert driver.poll() is None


def test_a_stage_that_is_tried_again_counts_its_attempts(world: World) -> None:
    assert world.run("first.die_at=3", "first.backoff_s=0.1").code == 0
    status = api.status(world.latest)
    assert status.stage("first").attempt == 2
    assert status.stage("first").log is not None
    assert str(status.stage("first").log).endswith("first.000001-2.log")


def test_names_that_are_nearly_right_are_suggested(finished: World) -> None:
    said = finished.bmojo("status", "stepps")
    assert said.code == 1
    assert "There is no run 'stepps'" in said.err
    assert "Did you mean 'steps'?" in said.err
    said = finished.bmojo("logs", "steps-", "x")
    assert said.code == 1
    assert "fits several runs" in said.err
    said = finished.bmojo("logs", finished.latest.run_id, "secnd")
    assert said.code == 1
    assert f"Run {finished.latest.run_id} has no stage 'secnd'. Did you mean 'second'?" in said.err
    said = finished.bmojo("why", "secnd")
    assert said.code == 1
    assert "Nor has the latest run" in said.err
    assert "Did you mean 'second'?" in said.err


def test_a_storage_without_runs(world: World) -> None:
    for command in ("status", "logs", "metadata", "why"):
        said = world.bmojo(command, "--json")
        assert said.code == 1
        assert said.out == ""
        assert "There are no runs" in said.err
    assert world.bmojo("list", "--json").json == []
    assert api.list_runs(open_storage(world.storage)) == []

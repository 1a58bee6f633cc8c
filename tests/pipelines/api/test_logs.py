"""`bmojo logs`: whole, the end, one attempt, and followed while a driver works and is killed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from pipelines import api
from pipelines.engine.events import Finished, Planned, RunInfo, Started
from pipelines.engine.runs import Run
from pipelines.storage import Storage
from pipelines.tracking.spool import Spool
from tests.pipelines.api.driving import World
from tests.pipelines.made_runs import made_run


def steps(stage: str, attempt: int, *numbers: int) -> list[str]:
    return [f"{stage} attempt {attempt} step {number}" for number in numbers]


@pytest.mark.ci
def test_the_log_of_a_stage_or_of_all(finished: World) -> None:
    run = api.find_run(finished.latest.storage, api.list_runs(finished.latest.storage)[0].run)
    said = finished.bmojo("logs", run.run_id, "second")
    assert said.out.splitlines() == steps("second", 1, 1, 2, 3, 4, 5)
    said = finished.bmojo("logs", run.run_id, "second", "--lines", "2")
    assert said.out.splitlines() == steps("second", 1, 4, 5)
    assert finished.bmojo("logs", run.run_id, "second", "-n", "0").out == ""
    said = finished.bmojo("logs", run.run_id, "--lines", "1")
    assert said.out.splitlines() == [f"{name} | {name} attempt 1 step 5" for name in ("first", "second")]
    said = finished.bmojo("logs", "second", "--lines", "99")
    assert said.out.splitlines() == steps("second", 1, 1, 2, 3, 4, 5), "a stage of the latest run"
    assert finished.bmojo("logs", "first").out == "", "reused: this run has no log of it"
    told = [json.loads(line) for line in finished.bmojo("logs", run.run_id, "--json").out.splitlines()]
    assert told[0] == {"stage": "first", "attempt": 1, "line": "first attempt 1 step 1"}
    assert len(told) == 10
    assert [line.line for line in api.logs(run, "second", follow=True)] == steps("second", 1, 1, 2, 3, 4, 5)


def test_each_attempt_has_its_log(world: World) -> None:
    assert world.run("first.die_at=3", "first.backoff_s=0.1").code == 0
    assert world.bmojo("logs", "first").out.splitlines() == steps("first", 2, 3, 4, 5)
    said = world.bmojo("logs", "first", "--attempt", "1")
    assert said.out.splitlines() == [*steps("first", 1, 1, 2, 3), "and no more"], "also a line without an end"
    said = world.bmojo("logs", "first", "--attempt", "3")
    assert said.code == 1
    assert "has no attempt 3: there is attempts 1 to 2" in said.err
    assert "name it" in world.bmojo("logs", "--attempt", "1").err


@pytest.mark.slow
def test_following_goes_through_attempts_to_the_end_of_the_stage(world: World) -> None:
    driver = world.drive(
        "first.step_s=0.3", "first.die_at=4", "first.backoff_s=0.1", "second.upto=300", "second.step_s=0.1"
    )
    following = world.start("logs", "first", "--follow")
    said = following.communicate(timeout=60)[0]
    assert following.returncode == 0
    told = [line for line in said.splitlines() if "Watching" not in line]
    assert told == [*steps("first", 1, 1, 2, 3, 4), "and no more", "first: attempt 2", *steps("first", 2, 4, 5)]
    assert driver.poll() is None, "the other stage goes on"


@pytest.mark.slow
def test_following_a_run_ends_when_its_driver_is_killed(world: World) -> None:
    driver = world.drive("first.upto=1000", "first.step_s=0.2")
    following = world.start("logs", "--follow", "--json")
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["line"] == "first attempt 1 step 1"
    driver.send_signal(signal.SIGKILL)
    rest = following.communicate(timeout=60)[0]
    assert following.returncode == 0
    numbers = [int(json.loads(line)["line"].split()[-1]) for line in rest.splitlines() if " step " in line]
    assert numbers == list(range(2, len(numbers) + 2)), "each line once"


@pytest.fixture
def far(s3_storage: Storage) -> Run:
    """A run in an object store, with a stage that has started."""
    run = made_run(s3_storage, "far-1a2b3c4d", {"stages": {"first": {}}}, {"first": "steps"})
    info = RunInfo.model_validate(run.info().model_dump())
    log = run.log(2)
    log.append(Planned(event="resumed", info=info))
    log.append(
        Started(stage="first", attempt=1, resumed=False, artifact="a", log="logs/first.000002-1.log", pid=1, host="x")
    )
    log.append(Finished(stage="first", artifact="a"))
    return run


@pytest.mark.ci
def test_a_log_in_an_object_store_is_read_here_or_there(far: Run) -> None:
    spool = Spool(far.storage, far.relpath)
    spool.log_dir.mkdir(parents=True)
    (spool.log_dir / "first.000002-1.log").write_text("one\ntwo\n")
    assert [line.line for line in api.logs(far, "first")] == ["one", "two"], "before it is uploaded"
    spool.upload()
    shutil.rmtree(spool.dir)
    assert not Path(spool.dir).exists()
    assert [line.line for line in api.logs(far, "first")] == ["one", "two"], "from another machine"
    assert [line.line for line in api.logs(far, "first", lines=1, follow=True)] == ["two"]

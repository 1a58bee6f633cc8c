"""Attempts in processes of their own: how they end, and that none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from pipelines.cli.running import ConsoleObserver
from pipelines.engine.events import AttemptLost, Noted, Started, Status
from pipelines.engine.graph import stage_graph
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.processes import StageProcess
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Run, list_runs
from pipelines.engine.scheduler import run_pipeline
from pipelines.engine.stage import Stage, StageConfig, StageContext, StageInputs, StageOutput
from pipelines.storage import Storage, open_storage
from pipelines.supervisor import ProgressPipe
from tests.pipelines.engine.counting_pipeline import nowhere
from tests.pipelines.engine.fatal_kind import FatalConfig, FatalStage
from tests.pipelines.engine.orderly_kind import SCRIPT as ORDERLY
from tests.pipelines.engine.toy_kinds import SCRIPT, Toys, events_of, names_of, run_toys, toy_pipeline
from tests.pipelines.waiting import wait_until

LONG = {"a": {"seconds": 300}, "b": {"seconds": 300}}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "store")


def start(storage: Storage, stages: dict[str, dict[str, Any]]) -> tuple[subprocess.Popen[bytes], Run]:
    """A scheduler in a process of its own, once all its stages run."""
    process = subprocess.Popen([*SCRIPT, storage.url, json.dumps(stages)])
    wait_until(lambda: list_runs(storage))
    (run,) = list_runs(storage)
    wait_until(lambda: names_of(run).count("started") == len(stages))
    return process, run


def pids(run: Run) -> list[int]:
    return [event.pid for event in events_of(run) if isinstance(event, Started)]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_file_in_the_current_directory_hides_no_module_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    process = StageProcess({}, tmp_path / "logs", ())
    process.end()
    assert (tmp_path / "logs/processes.log").read_text() == ""


def test_a_killed_attempt_is_followed_by_another(storage: Storage) -> None:
    result = run_toys(storage, launcher=None, a={"deed": "die", "times": 2})
    assert result.status is Status.SUCCEEDED
    assert names_of(result.run, "a") == ["started", "attempt_lost", "started", "attempt_lost", "started", "finished"]
    lost = [event for event in events_of(result.run, "a") if isinstance(event, AttemptLost)]
    assert [(event.budget, event.left) for event in lost] == [("lost_retries", 9), ("lost_retries", 8)]
    assert "was killed by SIGKILL" in lost[0].error
    assert len(set(pids(result.run))) == 3
    assert result.stages["a"].output.pid == pids(result.run)[-1]


def test_what_an_attempt_warns_of_is_shown_and_in_its_log(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = toy_pipeline(storage, a={"deed": "warn"})
    result = run_pipeline(pipeline, nowhere(), Toys(), observer=ConsoleObserver(None, ProgressPipe()))
    assert "  note: a: half of it was left out\n" in capsys.readouterr().out
    notes = [event.text for event in events_of(result.run, "a") if isinstance(event, Noted)]
    assert notes == ["half of it was left out"]
    assert names_of(result.run, "a") == ["started", "noted", "finished"]
    (started,) = [event for event in events_of(result.run, "a") if isinstance(event, Started)]
    assert "half of it was left out" in storage.read_bytes(f"{result.run.relpath}/{started.log}").decode()


def test_an_attempt_that_another_than_the_scheduler_tells_to_end_is_followed_by_another(storage: Storage) -> None:
    result = run_toys(storage, launcher=None, a={"deed": "terminate"})
    assert result.status is Status.SUCCEEDED
    assert names_of(result.run, "a") == ["started", "attempt_lost", "started", "finished"]
    (lost,) = [event for event in events_of(result.run, "a") if isinstance(event, AttemptLost)]
    assert (lost.budget, lost.error) == ("lost_retries", "the process was told to end (SIGTERM)")


def test_what_a_killed_attempt_forked_is_ended_too(storage: Storage) -> None:
    """The child has the pipe to the scheduler open: its end is not awaited."""
    result = run_toys(storage, launcher=None, a={"deed": "die with a child"})
    assert result.status is Status.SUCCEEDED
    child = result.stages["a"].artifact.read_json("child.json")["pid"]
    wait_until(lambda: not is_alive(child), 30)


def test_a_process_that_leaves_without_a_word_is_an_error(storage: Storage) -> None:
    result = run_toys(storage, launcher=None, a={"deed": "leave"})
    assert result.status is Status.RESUMABLE
    assert result.failure is not None
    assert "ended with exit code 3; the same command resumes" in result.failure.text
    assert run_toys(storage, a={"deed": "leave"}).status is Status.SUCCEEDED


@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        ("exits", Status.RESUMABLE, "ended with exit code 9"),
        ("raises", Status.FAILED, r"cannot load it \(RuntimeError: no such library\)"),
    ],
)
def test_a_process_that_dies_while_it_imports(storage: Storage, how: str, status: Status, text: str) -> None:
    cluster = Toys()
    cluster.environment = {"FATAL_KIND": how}
    pipeline = Pipeline("fatal", stage_graph({"a": FatalConfig()}, (FatalStage(),)), storage)
    result = run_pipeline(pipeline, nowhere(), cluster)
    assert result.status is status
    with pytest.raises(AssertionError, match=text):
        _require_success(result)


def test_a_kind_that_no_process_can_import_is_refused_and_stops_no_other(storage: Storage) -> None:
    class LocalConfig(StageConfig):
        kind: Literal["local"] = "local"

    class LocalStage(Stage[LocalConfig, StageInputs, StageOutput]):
        code_version = 1

        def run(self, config: LocalConfig, inputs: StageInputs, context: StageContext) -> StageOutput:
            return StageOutput()

    LocalStage.config_type = LocalConfig  # its names cannot be looked up
    graph = stage_graph({"a": LocalConfig(), "b": FatalConfig()}, (LocalStage(), FatalStage()))
    result = run_pipeline(Pipeline("local", graph, storage), nowhere(), Toys())
    assert result.status is Status.FAILED
    assert "must be in a module that can be imported" in result.failures["a"].text
    assert set(result.stages) == {"b"}
    assert "started" not in names_of(result.run, "a")


def test_a_stage_saves_its_work_if_every_process_of_the_run_is_told_to_end(storage: Storage) -> None:
    """As `ray job stop` does it. The scheduler tells the stage once more, which is the same request."""
    scheduler = subprocess.Popen([*ORDERLY, storage.url])
    wait_until(lambda: any("begun.json" in path for path in storage.files_under("artifacts")))
    for process in (*psutil.Process(scheduler.pid).children(recursive=True), psutil.Process(scheduler.pid)):
        process.terminate()
    assert scheduler.wait(60) == 75
    assert any("saved.json" in path for path in storage.files_under("artifacts"))
    (run,) = list_runs(storage)
    assert run.stored_state().status is Status.RESUMABLE


def test_sigterm_ends_two_stages_and_the_run_can_be_resumed(storage: Storage) -> None:
    scheduler, run = start(storage, LONG)
    stages = pids(run)
    scheduler.terminate()
    assert scheduler.wait(60) == 75
    wait_until(lambda: not any(map(is_alive, stages)), 30)
    state = run.state()
    assert state.status is Status.RESUMABLE
    assert [stage.status for stage in state.stages.values()] == [Status.RESUMABLE] * 2
    assert names_of(run)[-3:] == ["failed", "failed", "ended"]
    assert run_toys(storage, **{name: {} for name in LONG}).status is Status.SUCCEEDED


@pytest.mark.parametrize("stopped_stage", [False, True])
def test_nothing_outlives_a_killed_scheduler(storage: Storage, stopped_stage: bool) -> None:
    scheduler, run = start(storage, LONG)
    children = psutil.Process(scheduler.pid).children(recursive=True)
    assert {child.pid for child in children} >= set(pids(run))
    if stopped_stage:
        os.kill(pids(run)[0], signal.SIGSTOP)
    scheduler.kill()
    scheduler.wait()
    if stopped_stage:
        os.kill(pids(run)[0], signal.SIGCONT)
    wait_until(lambda: not any(is_alive(child.pid) for child in children), 60)
    assert run.state().status is Status.RESUMABLE
    assert run_toys(storage, **{name: {} for name in LONG}).status is Status.SUCCEEDED


def test_processes_end_with_the_run_that_started_them(storage: Storage) -> None:
    before = set(psutil.Process().children(recursive=True))
    result = run_toys(storage, launcher=None, a={}, b={"needs": ["a"]}, c={"deed": "raise", "times": 2})
    assert result.status is Status.FAILED
    wait_until(lambda: not any(is_alive(child.pid) for child in set(psutil.Process().children()) - before), 30)


def _require_success(result: RunResult) -> None:
    assert result.failure is None, result.failure.text

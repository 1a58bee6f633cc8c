from __future__ import annotations

import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from base.errors import UserError
from pipelines.engine.event_log import positions
from pipelines.engine.events import Status
from pipelines.engine.graph import stage_graph
from pipelines.engine.lease import LeaseHeldError, lease_holder
from pipelines.engine.observer import Observer
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.plan import Action
from pipelines.engine.runs import Run, delete_run, find_run, list_runs
from pipelines.engine.scheduler import run_pipeline
from pipelines.engine.stage import StageConfig
from pipelines.errors import ConfigError, InfrastructureError
from pipelines.storage import Storage, open_storage
from pipelines.tracking.journal import Journal, journals_of, read_events
from tests.pipelines.engine.counting_pipeline import (
    KINDS,
    SCRIPT,
    CountConfig,
    NoCluster,
    SumConfig,
    SumStage,
    counting_pipeline,
    nowhere,
    run_here,
)


def start(storage: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*SCRIPT, str(storage), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def actions(storage: Storage, **options: Any) -> dict[str, Action]:
    return {stage.name: stage.action for stage in counting_pipeline(storage, **options).plan()}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "store")


def test_planning_changes_nothing(storage: Storage) -> None:
    assert actions(storage) == {"count": Action.RUN, "sum": Action.RUN}
    assert not Path(storage.url).exists()


def test_a_run_is_reused_as_a_whole_and_without_a_cluster(storage: Storage) -> None:
    cluster = NoCluster()
    for _ in range(2):
        result = run_pipeline(counting_pipeline(storage), nowhere(), cluster)
        assert result.status is Status.SUCCEEDED
        assert result.stages["sum"].output.total == 10
    assert cluster.starts == 2, "once per stage of the first run only"
    assert len(list_runs(storage)) == 1


def test_a_stage_that_works_in_the_driver_starts_no_cluster(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SumStage, "uses_cluster", False)
    cluster = NoCluster()
    run_pipeline(counting_pipeline(storage), nowhere(), cluster)
    assert cluster.starts == 1, "for the stage `count`"


def test_only_what_a_change_reaches_runs_again_and_the_plan_says_why(storage: Storage) -> None:
    run_here(storage)
    planned = {stage.name: stage for stage in counting_pipeline(storage, scale=2.0).plan()}
    assert planned["count"].action is Action.REUSE
    assert planned["sum"].action is Action.RUN
    assert planned["sum"].changes == ("scale: 1.0 -> 2.0",)
    result = run_here(storage, scale=2.0)
    assert result.stages["sum"].output.total == 20
    assert [stage.reused for stage in result.run.state().stages.values()] == [True, False]
    changed = {stage.name: stage for stage in counting_pipeline(storage, upto=6).plan()}
    assert changed["count"].changes == ("upto: 5 -> 6",)
    assert changed["sum"].changes[-1].startswith("input count: ")


def test_a_renamed_stage_is_reused(storage: Storage) -> None:
    run_here(storage)
    graph = stage_graph({"numbers": CountConfig(), "all": SumConfig(needs=("numbers",))}, KINDS)
    renamed = Pipeline("renamed", graph, storage)
    assert [stage.action for stage in renamed.plan()] == [Action.REUSE, Action.REUSE]
    assert run_pipeline(renamed, nowhere(), NoCluster()).status is Status.SUCCEEDED


@pytest.mark.ci
def test_killed_before_any_change_of_any_file_the_same_command_goes_on(tmp_path: Path) -> None:
    """SIGKILL before every single write, rename, link and deletion of a run; no step is told twice, none is missing."""
    process = start(tmp_path, "--die-everywhere", "--upto", "2")
    output = process.communicate()[0]
    results = re.findall(r"^(\d+) (died|lived) (\w+)$", output, re.MULTILINE)
    assert len(results) > 40, output
    assert results[-1][1] == "lived"
    assert {finished for _, _, finished in results} == {"finished"}, output
    for k, _, _ in results:
        (run,) = list_runs(open_storage(tmp_path / k))
        assert run.state().status is Status.SUCCEEDED
        journals = journals_of(Path(run.url) / "journal", "count")
        steps = [event["step"] for path in journals for event, _ in read_events(path) if event["event"] == "metrics"]
        assert steps == [0, 1], k


def test_a_dead_driver_is_seen_for_what_it_is(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "store")
    process = start(tmp_path / "store", "--step-s", "0.2", "--upto", "50")
    assert process.stdout is not None
    process.stdout.readline()
    pipeline = counting_pipeline(storage, upto=50)
    run = pipeline.run_of(pipeline.plan())
    assert run.state().status is Status.RUNNING
    with pytest.raises(LeaseHeldError, match=f"Run {run.run_id} is held by process {process.pid}"):
        run_here(storage, upto=50)
    with pytest.raises(UserError, match=r"held by process \d+ .* bmojo cancel counting-.* bmojo unlock counting-"):
        delete_run(run)
    process.kill()
    process.wait()
    state = run.state()
    assert state.status is Status.RESUMABLE
    assert state.stages["count"].status is Status.RESUMABLE
    assert state.stages["sum"].status is Status.PENDING
    assert actions(storage, upto=50) == {"count": Action.RESUME, "sum": Action.RUN}


def test_a_run_is_cancelled_from_elsewhere_and_continued(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "store")
    pipeline = counting_pipeline(storage, upto=40, step_s=0.05)
    run = pipeline.run_of(pipeline.plan())
    with pytest.raises(UserError, match=r"has no history|is not running"):
        run.request_cancel()

    def cancel() -> None:
        while not storage.exists(f"artifacts/count/count-{pipeline.plan()[0].fingerprint.short}/steps/3.json"):
            time.sleep(0.02)
        run.request_cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    result = run_pipeline(pipeline, nowhere(), NoCluster(), lease_renew_s=0.1)
    thread.join()
    assert result.status is Status.CANCELLED
    assert run.state().stages["count"].status is Status.CANCELLED
    assert lease_holder(storage, run.lease_relpath) is None
    assert run_here(storage, upto=40).status is Status.SUCCEEDED


def test_a_driver_that_was_taken_over_stops_and_writes_nothing_more(storage: Storage) -> None:
    pipeline = counting_pipeline(storage, upto=400, step_s=0.05)
    run = pipeline.run_of(pipeline.plan())

    class TakenOver(Observer):
        def on_metrics(self, stage: Any, step: int, values: Any) -> None:
            if step == 2:
                (name,) = storage.list(run.lease_relpath)
                lease = storage.read_bytes(f"{run.lease_relpath}/{name}")
                storage.create_exclusive(f"{run.lease_relpath}/000099.json", lease)

    result = run_pipeline(pipeline, nowhere(), NoCluster(), observer=TakenOver(), lease_renew_s=0.1)
    assert result.status is Status.RESUMABLE
    assert result.failure is not None
    assert "taken over by another process" in result.failure.text
    assert all(position.owner == 1 for position in positions(storage, run.events_relpath))
    assert storage.list(run.lease_relpath)[-1] == "000099.json"


def test_sigterm_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    process = start(tmp_path, "--step-s", "0.2", "--upto", "50")
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.wait() == 75
    (run,) = list_runs(open_storage(tmp_path))
    assert run.state().status is Status.RESUMABLE
    assert run.state().stages["count"].error == "the process was told to end (SIGTERM)"


@pytest.mark.parametrize(
    ("fail", "status", "text", "has_traceback"),
    [
        ("user", Status.FAILED, "the text is empty; give another file", False),
        ("connection", Status.RESUMABLE, "ConnectionResetError: gone", True),
        ("bug", Status.FAILED, "RuntimeError: a bug with password ***", True),
    ],
)
def test_errors_are_judged_and_kept(
    storage: Storage, fail: str, status: Status, text: str, has_traceback: bool
) -> None:
    result = run_here(storage, fail=fail)
    assert result.status is status
    assert result.failed_stage == "count"
    assert result.failure is not None
    assert result.failure.text == text
    state = result.run.state()
    assert state.status is state.stages["count"].status is status
    assert state.stages["sum"].status is Status.PENDING
    traceback = Path(result.run.url) / "errors" / "count.txt"
    assert traceback.exists() is has_traceback
    if has_traceback:
        assert "hf_abcdef" not in traceback.read_text()
    assert run_here(storage).status is Status.SUCCEEDED, "fixed, the same run resumes"


def test_a_damaged_record_is_named(storage: Storage) -> None:
    result = run_here(storage)
    record = Path(result.stages["sum"].artifact.url) / "record.json"
    for content in ("{", '{"format": 1}'):
        record.write_text(content)
        with pytest.raises(UserError, match=r"record\.json is damaged.*Delete the directory"):
            run_here(storage)


def test_nothing_is_written_when_the_graph_or_the_storage_is_wrong(tmp_path: Path) -> None:
    cases: dict[str, dict[str, StageConfig]] = {
        "there is no stage 'x'": {"count": CountConfig(needs=("x",))},
        "needs itself": {"count": CountConfig(needs=("count",))},
        "a -> b -> a": {"a": CountConfig(needs=("b",)), "b": CountConfig(needs=("a",))},
        "there is no kind 'count'": {"count": CountConfig()},
    }
    for message, stages in cases.items():
        kinds = () if "kind" in message else KINDS
        with pytest.raises(ConfigError, match=message):
            run_pipeline(
                Pipeline("p", stage_graph(stages, kinds), open_storage(tmp_path / "store")), nowhere(), NoCluster()
            )
    assert not (tmp_path / "store").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        run_here(open_storage(tmp_path / "file" / "store"))


@pytest.mark.ci
def test_two_runs_that_share_a_stage_make_it_once(storage: Storage) -> None:
    other = start(Path(storage.url), "--step-s", "0.8", "--upto", "8")
    assert other.stdout is not None
    other.stdout.readline()
    waited: list[str] = []

    class Watching(Observer):
        def on_stage_queued(self, stage: Any, reason: str) -> None:
            assert "is making the same artifact" in reason
            waited.append(stage.name)

    result = run_pipeline(counting_pipeline(storage, scale=3.0, upto=8), nowhere(), NoCluster(), observer=Watching())
    assert waited == ["count"]
    assert result.run.state().stages["count"].reused
    assert result.stages["sum"].output.total == 84
    assert other.wait() == 0


def test_an_observer_hears_of_stages_and_metrics(storage: Storage) -> None:
    heard: list[Any] = []

    class Hearing(Observer):
        def on_stage_start(self, stage: Any) -> None:
            heard.append(("start", stage.name))

        def on_metrics(self, stage: Any, step: int, values: Any) -> None:
            heard.append((step, values["count"]))

        def on_stage_end(self, stage: Any, state: Any) -> None:
            heard.append(("end", stage.name, state.status))

    run_pipeline(counting_pipeline(storage, upto=2), nowhere(), NoCluster(), observer=Hearing())
    assert heard == [
        ("start", "count"),
        (0, 0.0),
        (1, 1.0),
        ("end", "count", "SUCCEEDED"),
        ("start", "sum"),
        ("end", "sum", "SUCCEEDED"),
    ]


def test_runs_are_found_by_id_beginning_and_name_and_deleted(storage: Storage) -> None:
    with pytest.raises(UserError, match="There are no runs"):
        find_run(storage)
    first, second = run_here(storage).run, run_here(storage, scale=2.0).run
    assert find_run(storage).run_id == second.run_id
    assert find_run(storage, "counting").run_id == second.run_id
    assert find_run(storage, first.run_id[:-2]).run_id == first.run_id
    with pytest.raises(UserError, match="fits several"):
        find_run(storage, "count")
    with pytest.raises(UserError, match="no run 'other'"):
        find_run(storage, "other")
    removed = delete_run(second, with_artifacts=True)
    assert len(removed) == 2, "the sum of the second run and its state; the count belongs to the first too"
    assert not Run(storage, second.run_id).exists()
    assert actions(storage)["count"] is Action.REUSE


@pytest.mark.ci
def test_a_run_on_an_object_store_continues_on_another_machine(
    s3_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_here(s3_storage, fail="connection").status is Status.RESUMABLE
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "another-machine"))
    result = run_here(s3_storage)
    assert result.status is Status.SUCCEEDED
    journals = [f"{result.run.relpath}/journal/{name}" for name in s3_storage.list(f"{result.run.relpath}/journal")]
    stored = b"".join(s3_storage.read_bytes(name) for name in journals if "/count." in name)
    lines = stored.decode().splitlines()
    assert [line for line in lines if '"metrics"' in line] == [line for line in lines if '"step"' in line]
    assert sum('"metrics"' in line for line in lines) == 5


def test_a_journal_that_cannot_be_written_does_not_hide_why_the_stage_failed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Journal.write

    def full(self: Journal, event: str, **fields: Any) -> None:
        if event == "end":
            raise InfrastructureError("no space")
        write(self, event, **fields)

    monkeypatch.setattr(Journal, "write", full)
    result = run_here(storage, fail="user")
    assert result.status is Status.FAILED
    assert result.failure is not None
    assert result.failure.text == "the text is empty; give another file"

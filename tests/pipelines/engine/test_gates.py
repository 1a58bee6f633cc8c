"""A result beyond its gate: what depends on it is not run, and the reason is told wherever one looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines import api
from pipelines.engine.events import Status
from pipelines.engine.results import RunResult
from pipelines.storage import Storage, open_storage
from pipelines.tracking.journal import journals_of, read_events
from pipelines.tracking.replay import RUN_JOURNAL
from tests.pipelines.engine.toy_kinds import names_of, run_toys


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "store")


def run(storage: Storage, gate: str, **fields: Any) -> RunResult:
    return run_toys(
        storage,
        a={"gate": gate, **fields},
        after={"needs": ["a"]},
        last={"needs": ["after"]},
        beside={"seconds": 0.3},
    )


def statuses(result: RunResult) -> dict[str, Status]:
    return {name: stage.status for name, stage in result.run.state().stages.items()}


def tags_of(result: RunResult, journal: str) -> dict[str, str]:
    """Of a stage, or of the whole run."""
    tags: dict[str, str] = {}
    for path in journals_of(result.run.storage.path(f"{result.run.relpath}/journal"), journal):  # type: ignore[attr-defined]
        for event, _ in read_events(path):
            tags |= event.get("tags", {})
    return tags


def test_what_depends_on_it_is_not_run_and_the_run_says_so(storage: Storage) -> None:
    result = run(storage, "stop")
    assert result.status is Status.STOPPED
    assert result.failure is not None
    assert (result.failure.exit_code, result.failure.text) == (3, "gate of a: loss is 5, above 4")
    assert (result.failed_stage, result.failures) == ("a", {})
    assert set(result.stages) == {"a", "beside"}
    assert statuses(result) == {
        "a": Status.SUCCEEDED, "after": Status.PENDING, "last": Status.PENDING, "beside": Status.SUCCEEDED,
    }  # fmt: skip
    status = api.status(result.run)
    assert (status.status, status.error, status.exit_code, status.resume) == (
        Status.STOPPED, "gate of a: loss is 5, above 4", 3, None,
    )  # fmt: skip
    assert status.stage("a").gate == "loss is 5, above 4"
    assert tags_of(result, "a")["bmojo.gate"] == "loss is 5, above 4"
    why = api.why(result.run)
    assert why.sentences[0] == "It was stopped: gate of a: loss is 5, above 4."
    assert "Nothing may go on from its result: loss is 5, above 4." in why.stages[0].sentences


def test_with_another_gate_the_same_command_goes_on_and_computes_nothing_again(storage: Storage) -> None:
    stopped = run(storage, "stop")
    again = run(storage, "stop")
    assert again.status is Status.STOPPED
    opened = run(storage, "open")
    assert opened.run.run_id == stopped.run.run_id == again.run.run_id
    assert opened.status is Status.SUCCEEDED
    assert opened.stages["a"].output == stopped.stages["a"].output
    assert set(statuses(opened).values()) == {Status.SUCCEEDED}
    assert api.status(opened.run).stage("a").gate is None
    assert names_of(opened.run, "a") == ["started", "finished", "gated", "gated"]
    assert tags_of(opened, "a")["bmojo.gate"] == "open"


def test_a_gate_may_fail_its_stage_which_keeps_its_result(storage: Storage) -> None:
    result = run(storage, "fail")
    assert result.status is Status.FAILED
    assert result.failure is not None
    assert (result.failure.exit_code, result.failure.text) == (1, "gate: loss is 5, above 4")
    assert set(result.failures) == {"a"}
    assert statuses(result) == {
        "a": Status.FAILED, "after": Status.PENDING, "last": Status.PENDING, "beside": Status.SUCCEEDED,
    }  # fmt: skip
    assert api.status(result.run).stage("a").error == "gate: loss is 5, above 4"
    assert run(storage, "fail").status is Status.FAILED
    opened = run(storage, "open")
    assert opened.status is Status.SUCCEEDED
    assert names_of(opened.run, "a").count("started") == 1


def test_a_failing_gate_stops_the_whole_run_if_the_stage_says_so(storage: Storage) -> None:
    result = run_toys(storage, a={"gate": "fail", "on_failure": "stop"}, long={"deed": "hang"})
    assert result.status is Status.FAILED
    assert result.run.state().stages["long"].status is Status.RESUMABLE


def test_a_finished_run_is_judged_by_a_new_gate(storage: Storage) -> None:
    assert run(storage, "open").status is Status.SUCCEEDED
    stopped = run(storage, "stop")
    assert stopped.status is Status.STOPPED
    assert tags_of(stopped, "a")["bmojo.gate"] == "loss is 5, above 4"
    ends = [
        event
        for path in journals_of(stopped.run.storage.path(f"{stopped.run.relpath}/journal"), RUN_JOURNAL)  # type: ignore[attr-defined]
        for event, _ in read_events(path)
        if event["event"] == "end"
    ]
    assert [end["status"] for end in ends] == ["SUCCEEDED", "STOPPED"]
    assert ends[-1]["tags"] == {"bmojo.error": "gate of a: loss is 5, above 4"}


def test_a_failure_is_told_before_a_gate(storage: Storage) -> None:
    result = run_toys(storage, a={"gate": "stop"}, after={"needs": ["a"]}, bad={"deed": "user"})
    assert (result.status, result.failed_stage) == (Status.FAILED, "bad")

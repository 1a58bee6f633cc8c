"""`bmojo output`, `metadata` and `diff`."""

from __future__ import annotations

import pytest

from base.errors import UserError
from pipelines import api
from tests.pipelines.api.driving import World


def run_ids(world: World) -> list[str]:
    return [row.run for row in api.list_runs(world.latest.storage)]


def test_the_output_of_a_stage(finished: World) -> None:
    said = finished.bmojo("output", "second", "--json")
    assert said.code == 0
    assert said.json["output"] == {"steps": 5, "value": 15.0}
    assert said.json["figures"] == {"steps/value": 15.0}
    assert said.json["artifact"].startswith(f"{finished.storage}/artifacts/steps/second-")
    first, second = run_ids(finished)
    assert finished.bmojo("output", first, "second", "--json").json["output"]["value"] == 5.0
    said = finished.bmojo("output", second, "first")
    assert "value: 5.0" in said.out
    assert f"{finished.storage}/artifacts/steps/first-" in said.out
    said = finished.bmojo("output", "steps")
    assert said.code == 1
    assert "'steps' is a run. Name one of its stages too: first, second." in said.err


def test_a_stage_without_output_says_how_it_is(world: World) -> None:
    assert world.run("first.fail=user").code == 1
    with pytest.raises(UserError, match="has no output: it is FAILED"):
        api.stage_output(world.latest, "first")
    said = world.bmojo("output", "second")
    assert said.code == 1
    assert "has no output: it is PENDING" in said.err


def test_metadata_of_a_stage_and_of_a_run(finished: World) -> None:
    known = finished.bmojo("metadata", "second", "--json").json
    assert known["config"]["scale"] == 3.0
    assert known["parts"]["code_version"] == 1
    assert known["parts"]["config"] == {"kind": "steps", "upto": 5, "scale": 3.0}
    assert known["reasons"][1:] == ["scale: 1.0 -> 3.0"]
    assert known["versions"]["python"]
    assert known["duration_s"] >= 0
    assert list(known["inputs"]) == ["first"]
    (attempt,) = known["attempts"]
    assert attempt["outcome"] == "SUCCEEDED"
    assert attempt["ended_at"] > attempt["started_at"]
    whole = finished.bmojo("metadata", "--json").json
    assert whole["drives"] == 1
    assert whole["hardware"]["cpu"]
    assert whole["config"]["stages"]["second"]["scale"] == 3.0
    assert [stage["stage"] for stage in whole["stages"]] == ["first", "second"]
    assert whole["stages"][1] == known
    said = finished.bmojo("metadata").out
    assert "hardware.cpu: " in said
    assert "second (steps) SUCCEEDED: 1 attempt" in said


@pytest.mark.ci
def test_metadata_counts_the_attempts_of_every_drive(world: World) -> None:
    assert world.run("first.die_at=3", "first.backoff_s=0.1", "second.fail=user").code == 1
    assert world.run().code == 0
    whole = api.run_metadata(world.latest)
    first, second = whole.stages
    assert whole.drives == 2
    assert [(one.number, one.driver, one.outcome) for one in first.attempts] == [(1, 1, "LOST"), (2, 1, "SUCCEEDED")]
    assert [(one.driver, one.outcome, one.resumed) for one in second.attempts] == [
        (1, "FAILED", False),
        (2, "SUCCEEDED", True),
    ]
    assert "SIGKILL" in (first.attempts[0].error or "")
    assert "the text is empty" in (second.attempts[0].error or "")


def test_the_difference_of_two_runs(finished: World) -> None:
    first, second = run_ids(finished)
    found = finished.bmojo("diff", first, second, "--json").json
    assert found["config"] == [{"field": "stages.second.scale", "first": 1.0, "second": 3.0, "only_in": None}]
    figures = {figure["figure"]: figure for figure in found["figures"]}
    assert figures["first/steps/value"]["difference"] == 0.0
    assert figures["second/steps/value"] == {
        "figure": "second/steps/value", "first": 5.0, "second": 15.0, "difference": 10.0, "relative": 2.0,
    }  # fmt: skip
    assert [stage["stage"] for stage in found["stages"]] == ["second"]
    said = finished.bmojo("diff", first, second).out
    assert "stages.second.scale" in said
    assert "+200.00%" in said


@pytest.mark.ci
def test_the_difference_to_a_run_with_other_stages(world: World) -> None:
    assert world.run("second.fail=user").code == 1
    shorter = "name: {name}\nstorage: {storage}\nstages:\n  first: {{kind: steps, upto: 2}}\n"
    world.write("shorter", shorter)
    assert world.run(name="shorter").code == 0
    found = world.bmojo("diff", "steps", "shorter", "--json").json
    fields = {field["field"]: field for field in found["config"]}
    assert fields["stages.first.upto"]["second"] == 2
    assert fields["stages.second.kind"]["only_in"].startswith("steps-")
    assert {figure["figure"]: (figure["first"], figure["second"]) for figure in found["figures"]} == {
        "first/steps/value": (5.0, None),
        "steps/value": (None, 2.0),
    }
    assert {stage["stage"]: (stage["first"], stage["second"]) for stage in found["stages"]} == {
        "first": ("SUCCEEDED", "SUCCEEDED"),
        "second": ("FAILED", None),
    }

"""Variables that travel with a job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.submit import environment
from pipelines.submit.environment import choose, load, not_shipped, to_file

ENVIRON = {"AWS_REGION": "r", "AWS_SECRET_ACCESS_KEY": "s", "MLFLOW_TRACKING_URI": "u", "HOME": "/root"}


def test_variables_are_named_one_by_one_or_by_their_beginning() -> None:
    assert choose(["MLFLOW_TRACKING_URI", "AWS_*"], ENVIRON) == {
        name: value for name, value in ENVIRON.items() if name != "HOME"
    }
    assert choose([], ENVIRON) == {}


def test_variables_that_a_run_may_need_are_named_if_they_stay_here() -> None:
    assert not_shipped({}, ENVIRON) == ["MLFLOW_TRACKING_URI"]
    assert not_shipped(ENVIRON, ENVIRON) == []


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("NOT_SET", "--env NOT_SET: no such variable is set here. Set it first."),
        ("GCP_*", "no such variable is set here"),
        ("AWS_REGION=eu", "--env AWS_REGION: .* Give the name alone"),
        ("HOME", "of each machine's own"),
        ("RAY_AUTH_TOKEN", "of each machine's own"),
        ("*", "of each machine's own"),
    ],
)
def test_others_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose([pattern], ENVIRON)


def test_a_value_given_on_the_command_line_is_not_repeated() -> None:
    with pytest.raises(UserError) as found:
        choose(["TOKEN=secret-value"], ENVIRON)
    assert "secret-value" not in str(found.value)


def test_a_job_sets_them_and_a_process_without_the_file_sets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    before = dict(os.environ)
    load()
    assert os.environ == before
    monkeypatch.setenv("BMOJO_TEST_SHIPPED", "old")
    (tmp_path / environment.FILE).write_bytes(to_file({"BMOJO_TEST_SHIPPED": "new"}))
    load()
    assert os.environ["BMOJO_TEST_SHIPPED"] == "new"

"""A kind of stage is one object and one entry of STAGES: all commands know it then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = """\
name: words
storage: {folder}/runs
stages:
  all: {{kind: words, file: {folder}/text.txt}}
  long: {{kind: words, file: {folder}/text.txt, at_least: 4, needs: {{shorter: all}}}}
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("a kind of stage\nis one object\n")
    file = folder / "words.yaml"
    file.write_text(PIPELINE.format(folder=folder))
    return file


def bmojo(*arguments: str | Path) -> tuple[int, str]:
    """The command with the kind `words`. Returns the exit code and the output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.stages.words_kind", *arguments],
        capture_output=True,
        text=True,
        env=environment | {"COLUMNS": "200"},
    )
    return done.returncode, done.stdout + done.stderr


def test_it_is_planned_with_its_estimate(pipeline: Path) -> None:
    code, output = bmojo("plan", pipeline)
    assert code == 0, output
    assert [line.split()[:3] for line in output.splitlines()[1:3]] == [
        ["all", "words", "run"],
        ["long", "words", "run"],
    ]
    assert "words stage  letters" in output
    assert "Soon." in output


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("long.at_leest=2", "stages.long.at_leest: unknown key. Did you mean 'at_least'?"),
        (
            "all.kind=word",
            "found kind 'word', expected one of tokenizer, tokenize, train, evaluate, ladder, report, export, python, "
            "words",
        ),
        ("all.at_least=5", "stages.long.at_least: found 4, less than all's."),
        (
            "long.needs={longer: all}",
            "stages.long.needs.longer: a words stage has no role 'longer'. Its roles: shorter",
        ),
    ],
)
def test_its_settings_and_roles_are_checked(pipeline: Path, override: str, expected: str) -> None:
    code, output = bmojo("plan", pipeline, override)
    assert code == 1
    assert expected in output


@pytest.mark.ci
def test_it_runs_and_is_shown_on_the_console_by_status_and_in_mlflow(pipeline: Path) -> None:
    code, output = bmojo("run", pipeline)
    assert code == 0, output
    assert "  all: 7 words in artifacts" in output
    assert "  long: 3 words in artifacts" in output
    _, status = bmojo("status", "words", "--storage", pipeline.parent / "runs")
    assert "all: 7 words, as status shows them" in status
    journals = [path.read_text() for path in pipeline.parent.glob("runs/runs/*/journal/*.jsonl")]
    events = [json.loads(line) for journal in journals for line in journal.splitlines()]
    figures = {name: value for event in events for name, value in event.get("values", {}).items()}
    assert (figures["all/words/counted"], figures["long/words/counted"]) == (7, 3)


def test_the_schema_knows_its_fields_and_roles() -> None:
    _, output = bmojo("schema")
    fields = json.loads(output)["$defs"]["WordsConfig"]["properties"]
    assert fields["at_least"]["description"] == "Count words of so many letters or more."
    (by_role,) = (form for form in fields["needs"]["anyOf"] if form["type"] == "object")
    assert list(by_role["properties"]) == ["shorter"]

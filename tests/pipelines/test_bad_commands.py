"""Mistakes on the command line end as one screen and exit code 1 or 2, without a traceback; nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.cli.app import main
from pipelines.loading import load_pipeline
from pipelines.storage import open_storage
from tests.pipelines.made_runs import made_run
from tests.pipelines.test_loading import PIPELINE

MAX_LINES = 15
FILES = {
    "empty.yaml": "",
    "list.yaml": "- a\n",
    "key.yaml": "? [a, b]\n: 1\n",
    "deep.yaml": "a: " + "[" * 3000,
    "surrogate.yaml": 'name: "\\ud83d"\nstages: {}\n',
    "date.yaml": "name: 2024-13-45\n",
    "nul.yaml": "name: a\0b\n",
    "documents.yaml": "name: a\n---\nname: b\n",
    "tab.yaml": "name: a\n\tstages: {}\n",
    "alias.yaml": "name: *nowhere\n",
    "cycle.yaml": "name: a\nstages: &s {x: *s}\n",
    "merge.yaml": "a: &a {<<: *a}\n",
    "kindless.yaml": "name: a\nstages: {x: {load: y}}\n",
    "utf16.yaml": "name: a\n".encode("utf-16"),
    "latin1.yaml": "name: é\n".encode("latin-1"),
    "tiny.yaml": PIPELINE,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failure(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that must fail."""
    monkeypatch.setattr(sys, "argv", ["bmojo", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main()
    printed = "".join(capsys.readouterr())
    assert ended.value.code in (1, 2)
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= MAX_LINES, printed
    return printed


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("file", [*(name for name in FILES if name != "tiny.yaml"), "missing.yaml", "."])
def test_broken_files(command: str, file: str, folder: Path, monkeypatch, capsys) -> None:
    assert file in failure([command, file], monkeypatch, capsys)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "tiny.yaml", "train.lr=abc"], "override 'train.lr=abc': stages.train.lr: found 'abc'"),
        (["plan", "tiny.yaml", "--train.lr=1e-3"], "Overrides have no dashes: train.lr=1e-3"),
        (["run", "tiny.yaml", "--train.lr=1e-3"], "Overrides have no dashes: train.lr=1e-3"),
        (["run", "train.lr=1e-3", "tiny.yaml"], "overrides come after the file"),
        (["plan", "tiny.yaml", *(f"train.k{n}=1" for n in range(30))], "... and 24 more."),
        (["plan", "tiny.yaml", "storage=$HOME/runs"], "variables are not replaced here"),
        (["plan", "tiny.yaml", "train.max_steps=" + "9" * 5000], "not valid YAML"),
        (["plan", "tiny.yaml", "x\udcff=1"], "is neither a stage nor a field"),
        (["generate", "--top-p", "0"], "is not above 0"),
        (["generate", "--top-p", "nan"], "top-p"),
        (["generate", "--temperature", "inf"], "is not a finite number"),
        (["generate", "--temperature", "-1"], "temperature"),
        (["generate", "--seed", "99999999999999999999999"], "seed"),
        (["generate", "--tokens", "0"], "tokens"),
        (["generate", "--top-k", "0"], "top-k"),
        (["schema", "-o", "/nowhere/at/all.json"], "Name a file that can be written with --output"),
        (["nonsense"], "No such command"),
    ],
)
def test_broken_arguments(arguments: list[str], expected: str, folder: Path, monkeypatch, capsys) -> None:
    printed = " ".join(failure(arguments, monkeypatch, capsys).replace("│", " ").split())
    assert expected in printed
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_the_version_is_shown(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bmojo", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("bmojo ")


def test_a_run_that_another_version_started_says_how_to_resume_it(folder: Path, monkeypatch, capsys) -> None:
    config = load_pipeline("tiny.yaml").model_dump(mode="json")
    config["stages"]["train"]["zero_stage"] = config["stages"]["train"].pop("backend")["zero_stage"]
    made_run(open_storage("runs"), "tiny-1", config, config_path="tiny.yaml")
    printed = failure(["resume", "tiny-1"], monkeypatch, capsys)
    assert "stages.train.zero_stage: unknown key. Did you mean 'backend.zero_stage'?" in printed
    assert "bmojo run tiny.yaml" in printed

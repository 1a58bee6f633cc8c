"""Every command of ours in these files is one that the program has, and its settings are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.loading import load_pipeline
from tests.docs.pages import ROOT
from tests.docs.test_snippets import check_bmojo

FOLDER = ROOT / "examples" / "clusters"


def commands(file: Path) -> list[str]:
    """Commands of ours in a file: in code, in comments, and in strings of YAML that span lines."""
    text = file.read_text()
    if file.suffix == ".yaml":
        text += "\n".join(str(document) for document in yaml.safe_load_all(text))
    return [match[0].rstrip(" &\\") for match in re.finditer(r"(?<![\w/:.-])bmojo [a-z][^`'\"&|;\n]*", text)]


@pytest.mark.parametrize("name", ["Dockerfile", "aws.yaml", "rayjob.yaml", "slurm.sbatch"])
def test_commands_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(FOLDER / name):
        check_bmojo(shlex.split(command.replace("$@", "CONFIG"))[1:])


def test_the_commands_are_found() -> None:
    assert [command.split()[:2] for command in commands(FOLDER / "Dockerfile")] == [["bmojo", "doctor"]]
    assert any("train.resources" in command for command in commands(FOLDER / "rayjob.yaml"))


def test_the_settings_of_the_rayjob_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    job = next(document for document in yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text()) if "spec" in document)
    program, verb, file, *overrides = job["spec"]["entrypoint"].split()
    assert (program, verb) == ("bmojo", "run")
    assert file.startswith("/opt/bmojo/"), "where the image has the checkout"
    load_pipeline(ROOT / file.removeprefix("/opt/bmojo/"), overrides)

"""What the pages tell a reader to type is valid: pipelines load, commands parse, make targets and modules exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from pipelines.cli.app import app
from pipelines.loading import load_pipeline
from tests.docs.pages import ROOT, commands, is_history, pages, read, snippets

LIVING = [page for page in pages() if not is_history(page)]
SUBCOMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))


def check_bmojo(arguments: list[str]) -> None:
    """Parse `bmojo ARGUMENTS` by the real parser; a pipeline file of ours is loaded with its overrides."""
    name, *rest = arguments
    if name in ("--version", "--help", "--install-completion"):
        return
    if not rest:  # the command's name in a sentence
        assert name in SUBCOMMANDS, f"no such command: bmojo {name}"
        return
    context = SUBCOMMANDS[name].make_context(name, list(rest))
    file = context.params.get("config")
    is_ours = file is not None and len(Path(file).parts) > 1  # those at the root are what readers of a tutorial saved
    if is_ours and (ROOT / str(file)).is_file():
        load_pipeline(ROOT / str(file), context.params.get("overrides") or ())


def check_command(command: str) -> None:
    """Raise if the command cannot work as it is written."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words.pop(0)
    match words:
        case ["bmojo", *arguments] if arguments and not arguments[0].isupper():
            check_bmojo([word for word in arguments if word != "..."])
        case ["make", *targets]:
            unknown = {target for target in targets if "=" not in target} - TARGETS
            assert not unknown, f"no such make target: {unknown}"
        case ["python", "-m", module, *_] if module.split(".")[0] in ("benchmarks", "kernels", "pipelines", "tests"):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() or "NAME" in module, module


@pytest.mark.parametrize("page", LIVING)
def test_commands_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line, command in commands(read(page)):
        try:
            check_command(command)
        except Exception as error:
            pytest.fail(f"{page}:{line}: {command}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("page", LIVING)
def test_yaml_loads(page: str, tmp_path: Path) -> None:
    for snippet in snippets(read(page)):
        if snippet.language != "yaml":
            continue
        parsed = yaml.safe_load(snippet.code)
        if isinstance(parsed, dict) and "stages" in parsed:
            file = tmp_path / "snippet.yaml"
            file.write_text(snippet.code, encoding="utf-8")
            load_pipeline(file)


@pytest.mark.parametrize(
    "command",
    ["bmojo run configs/quickstart.yaml train.lrr=1", "bmojo rum", "make nothing", "python -m kernels.nothing"],
)
def test_a_wrong_command_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=r"lrr|rum|nothing"):
        check_command(command)

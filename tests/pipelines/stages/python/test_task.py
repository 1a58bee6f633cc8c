"""Calling the user's function: what it is given, what becomes of what it returns and raises."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.stages.python import RunningStage
from pipelines.stages.python.config import PythonStageConfig
from pipelines.stages.python.output import PythonOutput
from pipelines.stages.python.running import Input
from pipelines.stages.python.sources import find_sources
from pipelines.stages.python.task import Call, call_function
from pipelines.storage import Storage, open_storage
from pipelines.storage.artifact import ArtifactDir


class Points:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.params: dict[str, Any] = {}

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.append((step, dict(values)))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params |= params

    def flush(self) -> bool:
        return True


Run = Callable[..., PythonOutput]


@pytest.fixture
def artifact(tmp_path: Path) -> ArtifactDir:
    return ArtifactDir(open_storage(tmp_path / "storage"), "artifacts/python/stage-1")


@pytest.fixture
def points() -> Points:
    return Points()


@pytest.fixture
def run(tmp_path: Path, artifact: ArtifactDir, points: Points) -> Run:
    """Write a module with a function `work`, and call it as a stage's task does."""

    def run(text: str, where: ArtifactDir = artifact, call: str = "mine:work", **args: Any) -> PythonOutput:
        (tmp_path / "mine.py").write_text(text)
        sources = find_sources(PythonStageConfig(kind="python", call=call, folder=str(tmp_path)))
        sources.write(where.local / "source")
        where.publish("source")
        modules = {file.module: str(file.path) for file in sources.files}
        return call_function(Call("mystage", call, args, {}, {}, modules, where), points)

    return run


def refusal(run: Run, text: str, error: type[Exception] = UserError, **options: Any) -> str:
    with pytest.raises(error) as refused:
        run(text, **options)
    assert refused.value.__cause__ is None  # it travels from another process, whose classes may not be here
    return str(refused.value)


def test_the_function_gets_its_settings_and_gives_facts_files_and_points(
    run: Run, artifact: ArtifactDir, points: Points
) -> None:
    output = run(
        "def work(stage):\n"
        "    (stage.folder / 'deep').mkdir()\n"
        "    (stage.folder / 'deep' / 'a.txt').write_text(stage.args['content'])\n"
        "    stage.log_params({'size': 3, 'where': stage.folder.name})\n"
        "    stage.log_metrics(7, {'loss': 0.5})\n"
        "    stage.progress(9, 9)\n"
        "    stage.log.info('hello')\n"
        "    return {'share': 0.25, 'count': 12345, 'name': stage.name}\n",
        content="written",
    )
    assert (output.numbers, output.texts) == ({"share": 0.25, "count": 12345}, {"name": "mystage"})
    assert (artifact.local / "files" / "deep" / "a.txt").read_text() == "written"
    assert (artifact.local / "log.txt").read_text().endswith(" INFO hello\n")
    assert points.params == {"size": 3, "where": "files"}
    assert points.metrics == [(7, {"loss": 0.5}), (9, {"python/total": 9}), (9, {"share": 0.25, "count": 12345.0})]
    assert sorted(artifact.describe_files()) == ["files/deep/a.txt", "log.txt", "source/mine.py"]


def test_a_method_may_be_called_and_nothing_returned(run: Run) -> None:
    assert run("class A:\n    @staticmethod\n    def work(stage): pass\n", call="mine:A.work").numbers == {}


def test_a_second_call_finds_the_folder_as_the_first_left_it(run: Run) -> None:
    text = (
        "def work(stage):\n"
        "    seen = stage.folder / 'seen'\n"
        "    if seen.exists(): return {'resumed': 1}\n"
        "    seen.touch()\n"
        "    raise KeyError('gone')\n"
    )
    refusal(run, text)
    assert run(text)["resumed"] == 1


def test_in_an_object_store_it_finds_what_was_saved_last(run: Run, s3_storage: Storage) -> None:
    text = (
        "def work(stage):\n"
        "    there = sorted(path.name for path in stage.folder.iterdir())\n"
        "    if there: return {'there': ' '.join(there)}\n"
        "    for name in 'ab': (stage.folder / name).touch()\n"
        "    stage.save()\n"
        "    (stage.folder / 'a').unlink(); (stage.folder / 'c').touch()\n"
        "    stage.save()\n"
        "    (stage.folder / 'd').touch()\n"
        "    raise KeyError('gone')\n"
    )
    artifact = ArtifactDir(s3_storage, "artifacts/python/stage-1")
    refusal(run, text, where=artifact)
    assert artifact.listdir("files") == ["b", "c"]
    assert run(text, where=artifact)["there"] == "b c"
    assert "KeyError" in artifact.storage.read_bytes("artifacts/python/stage-1/log.txt").decode()


def test_a_changed_module_is_imported_anew_and_none_is_left_behind(run: Run, artifact: ArtifactDir) -> None:
    path = list(sys.path)
    for value in (1, 2):
        assert run(f"def work(stage): return {{'value': {value}}}")["value"] == value
    assert "mine" not in sys.modules
    assert sys.path == path
    assert not list(artifact.local.rglob("__pycache__"))


def test_what_the_function_raises_shows_the_lines_that_the_user_wrote(
    run: Run, artifact: ArtifactDir, tmp_path: Path
) -> None:
    text = "import json\ndef work(stage):\n    parse('{')\ndef parse(text):\n    return json.loads(text)\n"
    message = refusal(run, text)
    assert message == (
        "mine:work raised JSONDecodeError: Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)\n"
        f"  {tmp_path}/mine.py:3 in work: parse('{{')\n"
        f"  {tmp_path}/mine.py:5 in parse: return json.loads(text)\n"
        f"The whole traceback is in {artifact.url}/log.txt. Correct the function, then run again."
    )
    assert "json/decoder.py" in (artifact.local / "log.txt").read_text()


def test_a_module_that_cannot_be_imported_shows_where_and_why(run: Run, tmp_path: Path) -> None:
    message = refusal(run, "x = 1\nimport not_installed\ndef work(stage): ...")
    assert "raised ModuleNotFoundError: No module named 'not_installed'\n" in message
    assert f"  {tmp_path}/mine.py:2 in <module>: import not_installed\n" in message


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("    return [1]", "returned something else than facts: found a list, expected a dict of numbers and texts"),
        ("    return {'a': {'b': 1}}", "found a dict at 'a', expected a number or text; larger results belong into "),
        ("    return {'a@1': 1}", "found the name 'a@1', expected letters, digits, spaces and any of _ - . : /"),
        ("    return {2: 1}", "found the name 2, expected letters"),
        ("    stage.log_metrics(0, {'a': 'x'})", "raised TypeError: a: found 'x' (str), expected a number."),
        ("    stage.log_metrics(0, {'../a': 1})", "raised ValueError: found the name '../a', expected letters"),
        (
            "    stage.log_metrics(0.5, {'a': 1})",
            "raised TypeError: 'float' object cannot be interpreted as an integer",
        ),
        ("    stage.inputs['x']", "raised KeyError: 'x'"),
        ("    raise SystemExit(3)", "called sys.exit(3). Return, or raise an error."),
        ("    open('/nowhere/at/all')", "raised FileNotFoundError: "),
        ("    from base.errors import UserError; raise UserError('the text is empty')", "mine:work: the text is empty"),
    ],
)
def test_mistakes_of_the_function_are_the_users(run: Run, body: str, problem: str) -> None:
    message = refusal(run, f"def work(stage):\n{body}\n")
    assert message.startswith("mine:work")
    assert problem in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("from os import path as work", "is of type module (<module 'posixpath' "),
        ("work = 3", "is of type int (3), expected a function that takes the running stage. Correct `call`."),
        ("import os\nwork = os.getcwd", "cannot be called with one argument, the running stage (too many positional"),
        ("from os import *", "mine has no 'work'. Correct `call`."),
    ],
)
def test_what_only_the_import_shows_is_refused(run: Run, text: str, problem: str) -> None:
    assert problem in refusal(run, text)


@pytest.mark.parametrize(
    "error",
    [
        "OSError(28, 'No space left on device')",
        "ConnectionResetError('gone')",
        "TimeoutError('slow')",
        "InfrastructureError('the service is away')",
    ],
)
def test_errors_that_may_pass_are_the_infrastructures(run: Run, error: str) -> None:
    text = f"from pipelines.errors import InfrastructureError\ndef work(stage):\n    raise {error}\n"
    message = refusal(run, text, InfrastructureError)
    assert "mine.py:3 in work" in message
    assert message.endswith("The same command resumes: the stage's files are kept.")


def test_a_process_that_ray_ends_is_not_the_function_calling_exit(run: Run) -> None:
    with pytest.raises(SystemExit):
        run("def work(stage):\n    e = SystemExit(1); e.ray_terminate_msg = 'SIGTERM'; raise e\n")


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    torch = pytest.importorskip("torch")
    output = PythonOutput.of({"a": np.int64(3), "b": np.float32(0.5), "c": torch.tensor(2.0), "d": True, "e": 1e-9})
    assert output.numbers == {"a": 3, "b": 0.5, "c": 2.0, "d": 1, "e": 1e-9}
    assert output.summary() == "a 3, b 0.5, c 2, d 1, e 1e-09"
    with pytest.raises(ValueError, match="found a ndarray at 'a'"):
        PythonOutput.of({"a": np.ones(3)})


def test_facts_survive_the_record(tmp_path: Path) -> None:
    output = PythonOutput.of({"nan": float("nan"), "whole": 5, "real": 5.0, "text": "5"})
    back = PythonOutput.model_validate_json(output.model_dump_json())
    assert repr(back.numbers) == repr(output.numbers) == "{'nan': nan, 'whole': 5, 'real': 5.0}"
    assert back["text"] == "5"


def test_a_function_can_be_tested_with_a_stage_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage = RunningStage(tmp_path, {"limit": 3})
    stage.log_metrics(1, {"loss": 2})
    stage.log_params({"limit": stage.args["limit"]})
    stage.progress(1, 10)
    stage.log.info("hello")
    stage.save()
    assert stage.last_step == 1
    assert "hello" in caplog.text


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"call": "mine"}, "pattern"),
        ({"call": "mine.work:"}, "pattern"),
        ({"modules": ["mine.py/x"]}, "found 'mine.py/x', expected a module's name"),
        ({"args": {"a": [{"since": __import__("datetime").date(2026, 1, 2)}]}}, "a.0.since: found a date (2026-01-02)"),
        ({"args": {"a": float("inf")}}, "a: found inf, expected a finite number"),
        ({"resources": {"num_workers": 2}}, "num_workers: found 2, but the function is called once, in one task."),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem.replace("(", r"\(").replace(")", r"\)")):
        PythonStageConfig.model_validate({"kind": "python", "call": "mine:work", **fields})


def test_another_python_stage_reads_what_the_function_left_in_its_folder(run: Run, artifact: ArtifactDir) -> None:
    run("def work(stage):\n    (stage.folder / 'sub').mkdir()\n    (stage.folder / 'sub' / 'a.txt').write_text('a')\n")
    python = Input(
        "made", "python", PythonStageConfig(kind="python", call="mine:work"), PythonOutput.of(None), "f", artifact
    )
    assert (python.path / "sub" / "a.txt").read_text() == "a"
    assert (python.fetch("sub") / "a.txt").read_text() == "a"
    other = Input("made", "tokens", python.config, python.output, "f", artifact)
    assert (other.path / "files" / "sub" / "a.txt").read_text() == "a"

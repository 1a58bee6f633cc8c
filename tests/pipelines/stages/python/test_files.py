"""Python stages in pipeline files: where modules are looked up, what a plan and the schema say, and the example."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.errors import ConfigError
from pipelines.loading import load_pipeline, pipeline_schema, validate_pipeline
from pipelines.session import open_pipeline
from pipelines.stages.python import Input, RunningStage

EXAMPLE = Path(__file__).parents[4] / "examples" / "own_stage"
PIPELINE = """\
name: mine
storage: {storage}
stages:
  first: {{kind: python, call: "mine:work"}}
  second: {{kind: python, call: "mine:work", needs: {{before: first}}, args: {{limit: 3, names: [a, null, true]}}}}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline file beside its module, in another folder than the current one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "there" / "mine.py").write_text("def work(stage): ...")
    found = tmp_path / "there" / "mine.yaml"
    found.write_text(PIPELINE.format(storage=tmp_path / "runs"))
    return found


def test_modules_lie_beside_the_pipeline_file(file: Path) -> None:
    config = load_pipeline("../there/mine.yaml")
    plan = open_pipeline(config).plan()
    assert [stage.fingerprint.parts.content.keys() for stage in plan] == [{"source of mine"}] * 2
    assert plan[1].fingerprint.parts.config["args"] == {"limit": 3, "names": ["a", None, True]}
    resumed = validate_pipeline(config.model_dump(mode="json"), "run.json")  # as `bmojo resume` does: without the file
    assert [stage.fingerprint for stage in open_pipeline(resumed).plan()] == [stage.fingerprint for stage in plan]


def test_where_the_modules_lie_does_not_count(file: Path) -> None:
    before = open_pipeline(load_pipeline(file)).plan()
    (file.parent / "mine.py").rename("mine.py")  # into the current folder
    after = open_pipeline(load_pipeline(file, ["first.folder=/nowhere"])).plan()
    assert [stage.fingerprint for stage in after] == [stage.fingerprint for stage in before]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("second.call=mime:work", "stages.second: call: there is no module 'mime' in "),
        ("second.call=mine", "override 'second.call=mine': stages.second.call: found 'mine', which has another form. "
                             "The function as `module:function`, such as `my_module:count`"),
        ("second.args.since=2026-01-02", "stages.second.args: since: found a date (2026-01-02), expected text, a"),
        ("second.arg.limit=3", "stages.second.arg: unknown key. Did you mean 'args'?"),
        ("second.needs={before: second}", "'second' needs itself"),
        ("second.resources.num_workers=4", "num_workers: found 4, but the function is called once, in one task."),
    ],
)  # fmt: skip
def test_mistakes_name_the_stage_and_the_field(file: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_pipeline(load_pipeline(file, [override])).plan()
    assert problem in str(refused.value)


def test_foreach_gives_a_function_other_settings_and_gathers_what_it_made(file: Path) -> None:
    overrides = ["first.foreach={args.limit: [1, 2]}", "second.needs={all: 'first[*]'}"]
    stages = {stage.name: stage for stage in open_pipeline(load_pipeline(file, overrides)).plan()}
    assert stages["first-2"].config.args == {"limit": 2}
    assert [node.name for node in stages["second"].node.inputs.by_name["all"]] == ["first-1", "first-2"]


def test_the_schema_lets_needs_have_any_names() -> None:
    fields = pipeline_schema()["$defs"]["PythonStageConfig"]["properties"]
    (by_name,) = (form for form in fields["needs"]["anyOf"] if form["type"] == "object")
    assert "properties" not in by_name
    assert by_name["additionalProperties"]


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vocabulary", EXAMPLE / "vocabulary.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_counts_the_same_after_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (*_, planned) = load_pipeline(EXAMPLE / "pipeline.yaml").graph()
    assert list(planned.stage.content_identity(planned.config)) == ["source of vocabulary"]
    vocabulary = example()
    documents = [np.array(ids) for ids in ([1, 1, 1, 1], [2, 1], [5], [1, 2], [1])]
    facts: Any = SimpleNamespace(vocab_size=10, num_train_documents=len(documents))
    tokens: Any = SimpleNamespace(output=facts, path=tmp_path)
    inputs: dict[str, Input] = {"tokens": tokens}

    def read(until: int) -> None:
        def documents_until(tokens: Any) -> Any:
            yield from documents[:until]
            if until < len(documents):
                raise ConnectionError("gone")

        monkeypatch.setattr(vocabulary, "read_token_documents", documents_until)

    stage = RunningStage(tmp_path / "files", {"share": 0.75, "save_every": 2}, inputs)
    stage.folder.mkdir()
    read(3)
    with pytest.raises(ConnectionError):
        vocabulary.coverage(stage)
    assert [path.name for path in stage.folder.iterdir()] == ["state.npz"]
    read(5)
    assert vocabulary.coverage(stage) == {"vocabulary/used": 0.3, "vocabulary/ids_for_share": 2}
    assert [path.name for path in stage.folder.iterdir()] == ["counts.npy"]
    assert np.load(stage.folder / "counts.npy").tolist() == [0, 7, 2, 0, 0, 1, 0, 0, 0, 0]

"""The measure `zero_shot`: its tasks, what it counts, and settings that are refused before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from base.errors import UserError
from benchmarks.zero_shot import Pair, answers, small_pair
from pipelines.errors import FieldError, InfrastructureError
from pipelines.stages.evaluate.harness.lm import HarnessLM
from pipelines.stages.evaluate.harness.tasks import load_tasks
from pipelines.stages.evaluate.language_model import NativeModel
from pipelines.stages.evaluate.measures import zero_shot, zero_shot_work
from pipelines.stages.evaluate.measures.zero_shot import ZeroShotConfig, ZeroShotMeasure
from tests.pipelines.stages.evaluate.harness.examples import EXAMPLES, write_examples

SETTING: Any = SimpleNamespace(is_text=True, config=SimpleNamespace(resources=None))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return small_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    zero_shot_work._loaded.cache_clear()
    monkeypatch.setattr(zero_shot, "EXAMPLES_PER_TASK", 2)


def config_of(folder: Path, **fields: Any) -> ZeroShotConfig:
    return ZeroShotConfig(data=str(write_examples(folder)), tasks=tuple(EXAMPLES), **fields)


def results_of(pair: Pair, config: ZeroShotConfig) -> dict[str, Any]:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", enabled=False)

    host: Any = SimpleNamespace(
        model=NativeModel(pair.model), tokenizer=pair.tokenizer, batch_tokens=256, autocast=autocast
    )
    return {task.key: task.work.run(host) for task in ZeroShotMeasure().tasks(config, SETTING)}


def test_slices_of_examples_add_up_to_what_lm_eval_finds(pair: Pair, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    results = results_of(pair, config)
    assert list(results)[:3] == ["lambada_openai-000000", "lambada_openai-000002", "hellaswag-000000"]
    measured = ZeroShotMeasure().reduce(config, SETTING, results)
    figures = {figure.name: figure for figure in measured.result.figures}
    assert set(figures) == ZeroShotMeasure().figure_names(config, SETTING)
    assert measured.result.num_units == sum(map(len, EXAMPLES.values()))
    lm = HarnessLM(NativeModel(pair.model), pair.tokenizer, 256)
    (lambada,) = load_tasks(["lambada_openai"], tmp_path, None, 0)
    logprobs = [response[0][0] for response in answers(lm, lambada).values()]
    assert figures["lambada_openai_perplexity"].value == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)))
    assert figures["lambada_openai_perplexity"].better == "lower"
    assert figures["hellaswag_acc"].chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert [name for name, figure in figures.items() if figure.is_main] == [
        "lambada_openai_acc",
        "hellaswag_acc_norm",
        "piqa_acc_norm",
        "winogrande_acc",
        "fda_contains",
    ]
    assert measured.units is not None
    assert set(measured.units.ratios) == set(figures)
    assert len(measured.units.ratios["lambada_openai_acc"].numerator_n) == 3
    assert "no solved examples" in measured.result.notes[0]


def test_two_models_are_asked_the_same_and_other_settings_ask_other_things(pair: Pair, tmp_path: Path) -> None:
    def identity(**fields: Any) -> str:
        config = config_of(tmp_path, **fields)
        units = ZeroShotMeasure().reduce(config, SETTING, results_of(pair, config)).units
        assert units is not None
        return units.identity

    assert identity() == identity(name="again")
    assert identity() != identity(limit=1)
    assert identity() != identity(num_fewshot=1)


def test_answers_to_other_examples_are_not_taken(pair: Pair, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    results = results_of(pair, config)
    file = tmp_path / "piqa.jsonl"
    file.write_text(file.read_text().replace("river", "stream"))
    zero_shot_work._loaded.cache_clear()
    with pytest.raises(UserError, match="the data of piqa changed while it was evaluated"):
        ZeroShotMeasure().reduce(config, SETTING, results)


def test_the_digest_of_the_files_counts(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    measure = ZeroShotMeasure()
    before = measure.content(config)
    assert measure.local_paths(config) == (str(tmp_path),)
    assert before == measure.content(config)
    (tmp_path / "piqa.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "label": 0}\n')
    assert before != measure.content(config)
    assert measure.content(ZeroShotConfig()) is None
    assert measure.local_paths(ZeroShotConfig()) == ()


def test_settings_that_cannot_work_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(config: ZeroShotConfig, setting: Any = SETTING) -> None:
        ZeroShotMeasure().check(config, setting)

    config = config_of(tmp_path)
    check(config)
    with pytest.raises(FieldError, match="the tokens of this stage are no text"):
        check(config, SimpleNamespace(is_text=False))
    with pytest.raises(FieldError, match="'piqa' is there twice"):
        check(ZeroShotConfig(tasks=("piqa", "piqa")))
    with pytest.raises(FieldError, match="there is no folder"):
        check(ZeroShotConfig(data=str(tmp_path / "nowhere")))
    with pytest.raises(FieldError, match=r"has no arc_easy\.jsonl or arc_easy\.jsonl\.gz"):
        check(ZeroShotConfig(data=str(tmp_path), tasks=("piqa", "arc_easy")))
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    with pytest.raises(FieldError, match=r"pip install 'bmojo-pipeline\[hf\]'"):
        check(config)


def test_a_task_that_lm_eval_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        all_tasks = ("piqa",)

        def load(self, names: list[str]) -> dict[str, Any]:
            raise ConnectionError("no network")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(UserError, match="lm-eval knows no task 'pica'"):
        ZeroShotMeasure().tasks(ZeroShotConfig(tasks=("pica",)), SETTING)
    with pytest.raises(InfrastructureError, match="set `data` to a folder with the examples"):
        ZeroShotMeasure().tasks(ZeroShotConfig(tasks=("piqa",)), SETTING)

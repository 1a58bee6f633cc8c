"""Whole evaluations on a Ray cluster with a GPU in name only (evaluations.py): who computes what, and what is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.stages.evaluate.stage import EvaluateOutput
from tests.pipelines.stages.evaluate.evaluations import NUM_KEPT, PROMPTS, Result, artifact_of, read

pytestmark = pytest.mark.ci

ON_GPU = ("ScoreBatches", "ScoreWindows", "ContinueTexts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    subprocess.run([sys.executable, "-m", "tests.pipelines.stages.evaluate.evaluations", str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    return read(folder)


def numbers(output: dict[str, Any]) -> dict[str, float]:
    """All figures, references, and points of curves."""
    found = {}
    for result in output["results"]:
        for figure in (*result["figures"], *result["references"]):
            found |= {f"{result['name']}/{figure['name']} {end}": figure[end] for end in ("value", "low", "high")}
        for curve in result["curves"]:
            found |= {f"{curve['name']} {point['x']}": point["y"] for point in curve["points"]}
    assert len(found) > 20
    return found


def test_one_process_answers_all_calls_of_a_gpu(results: dict[str, Result]) -> None:
    for name in ("gpu", "auto"):
        calls = [call for call in results[name].calls if call.kind in ON_GPU]
        assert {call.kind for call in calls} == set(ON_GPU)
        assert len({call.pid for call in calls}) == 1
        assert all(call.gpus == ["0"] for call in calls)


def test_work_without_a_model_holds_no_gpu(results: dict[str, Result]) -> None:
    for name in ("gpu", "auto"):
        (gzip,) = [call for call in results[name].calls if call.kind == "CompressDocuments"]
        assert gzip.gpus == []
        assert gzip.pid not in {call.pid for call in results[name].calls if call.kind in ON_GPU}


def test_on_the_cpu_it_shares_the_actors_of_the_models(results: dict[str, Result]) -> None:
    assert {call.kind for call in results["cpu"].calls} == {*ON_GPU, "CompressDocuments"}
    assert len({call.pid for call in results["cpu"].calls}) == 1


def test_another_model_is_loaded_once_after_all_that_need_the_first(results: dict[str, Result]) -> None:
    of_models = ["untrained=True" in call.work for call in results["gpu"].calls if call.kind in ON_GPU]
    assert of_models == sorted(of_models)
    assert True in of_models


def test_an_actor_killed_half_way_changes_no_bit(results: dict[str, Result]) -> None:
    killed, whole = results["killed"], results["gpu"]
    assert len({call.pid for call in killed.calls if call.kind in ON_GPU}) == 2
    assert sorted(call.work for call in killed.calls) == sorted(call.work for call in whole.calls)
    assert killed.output == whole.output


def test_an_evaluation_killed_half_way_repeats_no_finished_task(results: dict[str, Result]) -> None:
    interrupted, whole = results["interrupted"], results["cpu"]
    finished = [call.work for call in interrupted.calls_before][:NUM_KEPT]
    again = [call.work for call in interrupted.calls]
    assert len(finished) == NUM_KEPT
    assert not set(finished) & set(again)
    assert sorted(finished + again) == sorted(call.work for call in whole.calls)
    assert interrupted.output == whole.output


def test_work_on_a_gpu_is_cut_by_tokens_and_gives_the_same_figures(results: dict[str, Result]) -> None:
    rows = {name: {call.kind: call.rows for call in results[name].calls} for name in results}
    assert rows["cpu"] == {"ScoreBatches": 2, "ScoreWindows": 1, "ContinueTexts": 1, "CompressDocuments": 0}
    windows = sum(call.kind == "ScoreWindows" for call in results["cpu"].calls)
    assert rows["gpu"] == rows["cpu"] | {"ScoreWindows": windows, "ContinueTexts": 3}
    assert rows["auto"]["ScoreBatches"] == 65_536 // 64
    assert len([call for call in results["auto"].calls if call.kind == "ScoreBatches"]) == 2
    assert numbers(results["gpu"].output) == pytest.approx(numbers(results["cpu"].output), rel=1e-5)
    samples = results["gpu"].output["results"][-1]["samples"]
    assert samples == results["cpu"].output["results"][-1]["samples"]
    assert [sample["prompt"] for sample in samples] == list(PROMPTS)


def test_the_record_says_what_the_model_computed_in(results: dict[str, Result]) -> None:
    assert {name: result.output["precision"] for name, result in results.items()} == {
        "cpu": "fp32", "gpu": "fp32", "killed": "fp32", "auto": "bf16", "interrupted": "fp32",
    }  # fmt: skip
    low, full = numbers(results["auto"].output), numbers(results["gpu"].output)
    assert low["text/loss value"] != full["text/loss value"]
    assert low["text/loss value"] == pytest.approx(full["text/loss value"], rel=5e-3)
    assert low["text/gzip -9 value"] == full["text/gzip -9 value"]


def test_figures_are_those_of_the_sums_in_the_file_of_units(results: dict[str, Result], folder: Path) -> None:
    output = EvaluateOutput.model_validate(results["cpu"].output)
    for result in output.results[:2]:
        assert result.units is not None
        with np.load(artifact_of(folder, "cpu").local / result.units, allow_pickle=False) as units:
            assert len(str(units["identity"])) == 64
            assert len(result.figures) >= 2
            for figure in result.figures:
                sums = [units[f"{figure.name}.{part}"] for part in ("numerator", "denominator")]
                assert {len(of) for of in sums} == {result.num_units}
                ratio = sums[0].sum() / sums[1].sum()
                assert figure.value == pytest.approx(np.exp(ratio) if figure.transform == "exp" else ratio)
                assert figure.low is not None
                assert figure.high is not None
                assert figure.low < figure.value < figure.high

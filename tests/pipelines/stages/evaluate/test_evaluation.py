"""Whole evaluations on a Ray cluster with a GPU in name only (evaluations.py): who computes what, and what is lost."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.pipelines.stages.evaluate.evaluations import PROMPTS, Result, read

ON_GPU = ("score_batches", "score_windows", "continue_texts")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("evaluations")
    subprocess.run([sys.executable, "-m", "tests.pipelines.stages.evaluate.evaluations", str(folder)], check=True)
    return read(folder)


def figures(output: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: value for name, value in output.items() if isinstance(value, int | float)}
    by_position = {f"position_loss {number}": value for number, value in enumerate(output["position_loss"])}
    return numbers | by_position


def test_one_process_answers_all_calls_of_a_gpu(results: dict[str, Result]) -> None:
    for name in ("gpu", "auto"):
        calls = [call for call in results[name].calls if call.method in ON_GPU]
        assert {call.method for call in calls} == set(ON_GPU)
        assert len({call.pid for call in calls}) == 1
        assert all(call.gpus == ["0"] for call in calls)


def test_work_without_a_model_holds_no_gpu(results: dict[str, Result]) -> None:
    for name in ("gpu", "auto"):
        (gzip,) = [call for call in results[name].calls if call.method == "gzip_bits_per_byte"]
        assert gzip.gpus == []
        assert gzip.pid not in {call.pid for call in results[name].calls if call.method in ON_GPU}


def test_on_the_cpu_it_shares_the_actors_of_the_models(results: dict[str, Result]) -> None:
    assert {call.method for call in results["cpu"].calls} == {*ON_GPU, "gzip_bits_per_byte"}
    assert len({call.pid for call in results["cpu"].calls}) == 1


def test_an_actor_killed_half_way_changes_no_bit(results: dict[str, Result]) -> None:
    killed, whole = results["killed"], results["gpu"]
    assert len({call.pid for call in killed.calls if call.method in ON_GPU}) == 2
    assert sorted(call.method for call in killed.calls) == sorted(call.method for call in whole.calls)
    assert killed.output == whole.output


def test_work_on_a_gpu_is_cut_by_tokens_and_gives_the_same_figures(results: dict[str, Result]) -> None:
    rows = {name: {call.method: call.rows for call in results[name].calls} for name in results}
    assert rows["cpu"] == {"score_batches": 2, "score_windows": 1, "continue_texts": 1, "gzip_bits_per_byte": 0}
    assert rows["gpu"] == rows["cpu"] | {"score_windows": results["gpu"].output["num_windows"], "continue_texts": 3}
    assert rows["auto"]["score_batches"] == 65_536 // 64
    assert len([call for call in results["auto"].calls if call.method == "score_batches"]) == 2
    assert figures(results["gpu"].output) == pytest.approx(figures(results["cpu"].output), rel=1e-5)
    assert results["gpu"].output["samples"] == results["cpu"].output["samples"]
    assert [sample["prompt"] for sample in results["gpu"].output["samples"]] == list(PROMPTS)


def test_the_record_says_what_the_model_computed_in(results: dict[str, Result]) -> None:
    assert {name: result.output["precision"] for name, result in results.items()} == {
        "cpu": "fp32", "gpu": "fp32", "killed": "fp32", "auto": "bf16"
    }  # fmt: skip
    low, full = results["auto"].output, results["gpu"].output
    assert low["loss"] != full["loss"]
    assert low["loss"] == pytest.approx(full["loss"], rel=5e-3)
    assert low["gzip_bits_per_byte"] == full["gzip_bits_per_byte"]

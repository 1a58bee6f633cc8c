"""lm-eval on the native model gives what its `hf` type gives on the exported one, example by example."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.zero_shot import Pair, compare, small_pair
from tests.pipelines.stages.evaluate.harness.examples import EXAMPLES, write_examples


class Exported(NamedTuple):
    pair: Pair
    data: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("zero_shot")
    return Exported(small_pair(folder / "model"), write_examples(folder / "data"))


@pytest.mark.ci
@pytest.mark.usefixtures("hf_modules_cache")
@pytest.mark.parametrize("num_fewshot", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_native_equals_hf_on_every_task(exported: Exported, num_fewshot: int) -> None:
    rows = compare(exported.pair, exported.data, list(EXAMPLES), limit=None, num_fewshot=num_fewshot)
    assert {(row.task, row.metric) for row in rows} >= {
        ("lambada_openai", "perplexity"),
        ("lambada_openai", "acc"),
        ("hellaswag", "acc_norm"),
        ("piqa", "acc"),
        ("winogrande", "acc"),
        ("fda", "contains"),
    }
    for row in rows:
        assert row.native == pytest.approx(row.hf, rel=1e-4), row
        assert row.num_different_answers == 0, row
        assert row.largest_difference < 2e-3, row

"""lm-eval on the native model gives what its `hf` type gives on the exported one, example by example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.zero_shot import Pair, compare, small_pair

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [
        {"context": "The kite rose above the hill, and Ada let out more string. Higher went the", "target": "kite"},
        {"context": "He looked for his boat all day. In the evening he had found his", "target": "boat"},
        {"context": "Here", "target": "it is \u00e9t\u00e9"},
    ],
    "hellaswag": [
        {"context": "Baking: A man kneads dough. he", "choices": ["puts it into an oven.", "eats a car."], "label": 0},
        {
            "context": "Rowing: Two women carry a boat to the water. they",
            "choices": ["paint it.", "step into it and row away over the whole lake.", "sell the lake.", "sleep."],
            "label": 1,
        },
    ],
    "piqa": [
        {"context": "Question: keep bread fresh\nAnswer:", "choices": ["in a box", "in a river"], "label": 0},
        {"context": "Question: \u00e4 b\nAnswer:", "choices": ["\u00fc", "\u00fc\u00fc\u00fc"], "label": 1},
    ],
    "winogrande": [
        {
            "contexts": ["The cup fell off the shelf since the cup", "The cup fell off the shelf since the shelf"],
            "continuation": "was too near the edge.",
            "label": 0,
        },
        {
            "contexts": ["Ben thanked Tom since Ben", "Ben thanked Tom since Tom"],
            "continuation": "had helped.",
            "label": 1,
        },
    ],
    "fda": [
        {"context": "Name: sky. Colour: blue. The colour of the sky is", "answers": ["blue", "azure"]},
        {"context": "One two three one two", "answers": ["three"]},
    ],
}


class Exported(NamedTuple):
    pair: Pair
    data: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("zero_shot")
    data = folder / "data"
    data.mkdir()
    for name, rows in EXAMPLES.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Exported(small_pair(folder / "model"), data)


@pytest.mark.usefixtures("hf_modules_cache")
@pytest.mark.parametrize("num_fewshot", [0, 1])
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

"""Examples in local files: what is read, and what is refused with a line that says why."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base.errors import UserError
from data.errors import DataError
from pipelines.stages.evaluate.harness.local_tasks import examples_file, local_task, read_examples
from pipelines.stages.evaluate.harness.tasks import load_tasks, metrics_of

CHOICE = {"context": "One two", "choices": ["three", "four five"], "label": 0}
TARGET = {"context": "One two", "target": "three"}
CONTEXTS = {"contexts": ["One", "Two"], "continuation": "three", "label": 1}
ANSWERS = {"context": "One two", "answers": ["three"]}


def write(folder: Path, name: str, *rows: Any) -> Path:
    file = folder / name
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


def test_files_are_found_by_the_names_of_tasks(tmp_path: Path) -> None:
    plain, packed = write(tmp_path, "piqa.jsonl", CHOICE), write(tmp_path, "lambada.jsonl.gz", TARGET)
    assert examples_file(tmp_path, "piqa") == plain
    assert examples_file(tmp_path, "lambada_openai") == packed
    assert examples_file(tmp_path, "hellaswag") is None
    assert read_examples(packed) == [TARGET]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["{\n"], "line 1: not JSON"),
        ([CHOICE, {"context": "a"}], r"line 2: expected an object with choices, context, label"),
        ([CHOICE, TARGET], "line 2: expected an object with choices"),
        ([{**CHOICE, "label": 2}], "line 1: .* labels are indices"),
        ([{**CHOICE, "label": True}], "line 1: .* labels are indices"),
        ([{**CONTEXTS, "continuation": " "}], "no text is empty"),
        (["[1]\n"], "line 1: expected an object with"),
        (["\n"], "no examples"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, rows: list[Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_examples(write(tmp_path, "task.jsonl", *rows))


def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, "task.jsonl.gz", *[CHOICE] * 1000)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(file)


def test_a_task_without_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no examples of piqa: expected piqa\.jsonl or piqa\.jsonl\.gz"):
        load_tasks(["piqa"], tmp_path, None, 0)


def test_requests_join_texts_with_one_blank(tmp_path: Path) -> None:
    for name, row in (("choice", CHOICE), ("target", TARGET), ("contexts", CONTEXTS), ("answers", ANSWERS)):
        write(tmp_path, f"{name}.jsonl", row)
    asked = {
        loaded.name: [request.args for request in loaded.examples[0].requests]
        for loaded in load_tasks(["choice", "target", "contexts", "answers"], tmp_path, None, 0)
    }
    assert asked["choice"] == [("One two", " three"), ("One two", " four five")]
    assert asked["target"] == [("One two", " three")]
    assert asked["contexts"] == [("One", " three"), ("Two", " three")]
    assert asked["answers"][0][0] == "One two"
    assert asked["answers"][0][1]["until"] == ["\n"]


def test_examples_shown_are_others_and_the_same_every_time(tmp_path: Path) -> None:
    rows = [{"context": f"Question {number}", "target": f"answer {number}"} for number in range(6)]
    write(tmp_path, "task.jsonl", *rows)
    first, again = (load_tasks(["task"], tmp_path, 4, 2)[0] for _ in range(2))
    assert len(first.examples) == 4
    assert first.identity() == again.identity()
    for number, example in enumerate(first.examples):
        (context, target), *_ = [request.args for request in example.requests]
        *shown, asked = context.split("\n\n")
        assert len(shown) == 2
        assert asked == f"Question {number}"
        assert target == f" answer {number}"
        assert all(text != f"Question {number} answer {number}" and text.count("answer") == 1 for text in shown)
        assert "  " not in context


def test_metrics_against_values_by_hand(tmp_path: Path) -> None:
    write(tmp_path, "choice.jsonl", CHOICE, {**CHOICE, "label": 1}, {**CHOICE, "choices": ["a", "b", "c", "d"]})
    write(tmp_path, "target.jsonl", TARGET, TARGET)
    choice, target = load_tasks(["choice", "target"], tmp_path, None, 0)
    # acc: -4 > -5, wrong for the second. acc_norm: -4 / 5 letters < -5 / 9 letters, so the second is right.
    pair = [(-4.0, False), (-5.0, False)]
    metrics, notes = metrics_of(choice, {0: pair, 1: pair, 2: [(-1.0, False)] * 3 + [(-0.5, True)]})
    assert not notes
    assert metrics["acc"].numerator_n.tolist() == [1, 0, 0]
    assert metrics["acc_norm"].numerator_n.tolist() == [0, 1, 0]
    assert metrics["acc"].chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    bits = metrics["bits_per_byte"]
    assert np.allclose(bits.numerator_n, np.array([4, 5, 1]) / np.log(2))
    assert bits.denominator_n.tolist() == [len(" three"), len(" four five"), len(" a")]
    assert bits.better == "lower"
    metrics, _ = metrics_of(target, {0: [(-1.0, True)], 1: [(-3.0, False)]})
    assert metrics["acc"].numerator_n.tolist() == [1, 0]
    assert metrics["perplexity"].numerator_n.tolist() == [1, 3]
    assert metrics["perplexity"].transform == "exp"
    assert metrics["perplexity"].better == "lower"
    assert metrics["acc"].chance is None


def test_an_answer_is_found_in_any_case(tmp_path: Path) -> None:
    write(tmp_path, "task.jsonl", {"context": "a", "answers": ["x (1)", "YES"]})
    (loaded,) = load_tasks(["task"], tmp_path, None, 0)
    for text, found in (("so yes.", 1.0), ("X (1)", 1.0), ("x 1", 0.0)):
        metrics, _ = metrics_of(loaded, {0: [text]})
        assert metrics["contains"].numerator_n.tolist() == [found]


def test_a_task_is_one_that_lm_eval_runs_itself(tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.api.model import LM

    class Constant(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-float(len(request.args[1])), False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            return ["three" for _ in requests]

    tasks = [local_task(name, [row]) for name, row in (("choice", CHOICE), ("contexts", CONTEXTS), ("a", ANSWERS))]
    found = lm_eval.evaluate(Constant(), {task.config.task: task for task in tasks}, bootstrap_iters=0)
    assert found is not None
    assert found["results"]["choice"]["acc,none"] == 1.0
    assert found["results"]["contexts"]["acc,none"] == 0.0
    assert found["results"]["a"]["contains,none"] == 1.0

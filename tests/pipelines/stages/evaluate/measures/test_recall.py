"""Recall suites: what guessers get, what is counted, and how far away answers are."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.config import SyntheticSource
from data.tasks.mad import InContextRecall, Memorization
from data.tasks.mqar import Mqar
from data.tasks.retrieval import Needle
from data.tasks.state_tracking import S5, Parity
from data.tasks.task import Task, TaskSequence
from data.tasks.text.example import TextExample, TextTask
from data.tasks.text.needle import TextNeedle
from data.tokenizer import byte_tokenizer
from pipelines.errors import FieldError
from pipelines.stages.evaluate.continuations import ContinuationScore
from pipelines.stages.evaluate.measures import recall_work
from pipelines.stages.evaluate.measures.recall import RecallConfig, RecallMeasure, text_suites
from pipelines.stages.evaluate.measures.recall_work import AskInIds, AskInWords, answers_in_ids, answers_in_words

BYTES = byte_tokenizer()


class Guesser:
    """A model with random logits, of some ids or of all."""

    device = torch.device("cpu")
    max_tokens = None

    def __init__(self, vocab_size: int, seed: int = 0, among: range | None = None) -> None:
        self.vocab_size = vocab_size
        self._rng = torch.Generator().manual_seed(seed)
        self._among = list(range(vocab_size) if among is None else among)

    def logits_at(
        self,
        tokens_bt: torch.Tensor,
        rows_s: torch.Tensor,
        columns_s: torch.Tensor,
        wanted_bt: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits_sv = torch.full((len(rows_s), self.vocab_size), -100.0)
        logits_sv[:, self._among] = torch.randn(len(rows_s), len(self._among), generator=self._rng)
        return logits_sv


class Oracle:
    """A model that knows what follows each beginning of some sequences."""

    device = torch.device("cpu")
    max_tokens = None

    def __init__(self, vocab_size: int, sequences: Sequence[Sequence[int]]) -> None:
        self.vocab_size = vocab_size
        self._next = {tuple(sequence[:end]): sequence[end] for sequence in sequences for end in range(1, len(sequence))}

    def logits_at(
        self,
        tokens_bt: torch.Tensor,
        rows_s: torch.Tensor,
        columns_s: torch.Tensor,
        wanted_bt: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits_sv = torch.zeros(len(rows_s), self.vocab_size)
        for number, (row, column) in enumerate(zip(rows_s.tolist(), columns_s.tolist(), strict=True)):
            past = tuple(tokens_bt[row, : column + 1].tolist())
            if past in self._next:
                logits_sv[number, self._next[past]] = 30.0
        return logits_sv


def host(model: Any) -> Any:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", enabled=False)

    return SimpleNamespace(model=model, tokenizer=BYTES, batch_tokens=4096, autocast=autocast)


def setting(source: Any = None) -> Any:
    """Of text, unless a source of token ids is given."""
    tokens = SimpleNamespace(config=SimpleNamespace(source=source, seq_len=64), output=SimpleNamespace(eod_id=99))
    return SimpleNamespace(is_text=source is None, tokens=(tokens,), seq_len=64, config=SimpleNamespace(resources=None))


def synthetic(task: Task) -> SyntheticSource:
    fields = {"kind": "synthetic", "task": task.model_dump(), "num_documents": 10, "seed": 0}
    return SyntheticSource.model_validate(fields)


@pytest.mark.parametrize("name", list(text_suites(700)))
def test_a_guesser_gets_what_chance_says_of_suites_in_words(name: str) -> None:
    """Measured: random scores for the choices of examples as they are drawn."""
    suite = text_suites(700)[name]
    num = 60 if isinstance(suite, TextTask) else 150
    found = AskInWords(suite, 0, range(num), 1, 8).run(host(Guesser(257)))
    chance = float(found["chance"].mean())
    assert chance == pytest.approx({"parity": 1 / 2, "phonebook": 1 / 8}.get(name, 1 / 8), rel=0.6)
    assert abs(found["right"].mean() - chance) < 3.5 * (chance * (1 - chance) / num) ** 0.5
    assert not found["exact"].any()


@pytest.mark.parametrize("task", [Mqar(kind="mqar"), Needle(kind="needle"), Parity(kind="parity"), S5(kind="s5")])
def test_a_guesser_gets_what_chance_says_of_suites_in_ids(task: Task) -> None:
    """Measured: random logits of the ids that answers are drawn from."""
    found = AskInIds(task, 0, range(400), task.num_ids).run(host(Guesser(task.num_ids + 1, among=task.answer_ids)))
    spread = (task.chance * (1 - task.chance) / len(found["right"])) ** 0.5
    assert abs(found["right"].mean() - task.chance) < 4 * spread
    assert (found["chance"] == task.chance).all()


def test_an_oracle_gets_everything_right_in_ids() -> None:
    task = Mqar(kind="mqar", num_pairs=4, num_queries=3, seq_len=32)
    work = AskInIds(task, 3, range(5, 12), 64)
    documents = [task.draw(recall_work.generator(3, number)) for number in range(5, 12)]
    oracle = Oracle(65, [[64, *document.tokens.tolist()] for document in documents])
    found = work.run(host(oracle))
    assert found["right"].tolist() == [1.0] * 21
    assert sorted(found["example"].tolist()) == [number for number in range(7) for _ in range(3)]
    want = [at - document.source[at] for document in documents for at in np.flatnonzero(document.is_answer)]
    assert sorted(found["distance"].tolist()) == sorted(want)
    assert (found["distance"] >= task.min_distance).all()


def test_an_oracle_gets_everything_right_in_words() -> None:
    suite = TextNeedle(kind="text_needle", num_tokens=900, num_keys=3)
    work = AskInWords(suite, 0, range(4), 0, 8)
    examples = list(work.examples(BYTES))
    texts = [example.prompt + example.answer for example in examples]
    sequences = [[BYTES.eod_id, *ids.tolist()] for ids in BYTES.encode_batch(texts)]
    found = work.run(host(Oracle(257, sequences)))
    assert found["right"].tolist() == [1.0] * 4
    assert found["exact"].all()
    assert found["distance"].tolist() == [len(example.prompt) - example.source for example in examples]


def test_documents_of_unequal_length_are_read_as_alone() -> None:
    documents = [Parity(kind="parity", max_length=9).draw(np.random.default_rng(seed)) for seed in range(6)]
    oracle = Oracle(4, [[3, *document.tokens.tolist()] for document in documents])
    together = answers_in_ids(oracle, documents, 3, 0.5, batch_tokens=24)  # type: ignore[arg-type]
    assert together["right"].tolist() == [1.0] * 6
    assert sorted(together["example"].tolist()) == list(range(6))


def test_equal_scores_share_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [TextExample("a b c", " b", [" x", " y"], 2), TextExample("a b c", " c", [" x"], -1)]
    scores = [-1.0, -1.0, -2.0, -3.0, -2.0]
    monkeypatch.setattr(
        recall_work, "score_continuations", lambda *_: [ContinuationScore(score, score == -3.0) for score in scores]
    )
    found = answers_in_words(Guesser(257), BYTES, examples, 100)  # type: ignore[arg-type]
    assert found["right"].tolist() == [0.5, 0.0]
    assert found["exact"].tolist() == [False, True]
    assert found["distance"].tolist() == [3, -1]
    assert found["chance"].tolist() == [1 / 3, 1 / 2]


def test_examples_are_not_among_the_documents_of_a_source_with_the_same_seed() -> None:
    task = InContextRecall(kind="in_context_recall")
    read = {tuple(task.draw(np.random.default_rng((0, number))).tokens) for number in range(300)}
    asked = {tuple(task.draw(recall_work.generator(0, number)).tokens) for number in range(300)}
    assert not read & asked
    assert len(asked) == 300


def test_slices_give_the_same_examples_as_one_task() -> None:
    suite = TextNeedle(kind="text_needle", num_tokens=700)
    whole = list(AskInWords(suite, 1, range(6), 0, 8).examples(BYTES))
    parts = [example for at in (0, 3) for example in AskInWords(suite, 1, range(at, at + 3), 0, 8).examples(BYTES)]
    assert whole == parts


def results_of(config: RecallConfig, of: Any, guesser: Guesser) -> dict[str, Any]:
    return {task.key: task.work.run(host(guesser)) for task in RecallMeasure().tasks(config, of)}


def test_figures_say_what_was_counted() -> None:
    config = RecallConfig(suites={"a": Mqar(kind="mqar"), "b": Parity(kind="parity")}, num_examples=60, num_shown=0)
    results = results_of(config, setting(), Guesser(257))
    assert list(results) == ["a-000000", "a-000050", "b-000000", "b-000050"]
    measured = RecallMeasure().reduce(config, setting(), results)
    figures = {figure.name: figure for figure in measured.result.figures}
    assert set(figures) == RecallMeasure().figure_names(config, setting())
    right = np.concatenate([results[key]["right"] for key in ("a-000000", "a-000050")])
    assert figures["a_accuracy"].value == pytest.approx(right.mean())
    assert figures["a_accuracy"].chance == pytest.approx(1 / 8)
    assert figures["b_accuracy"].chance == pytest.approx(1 / 2)
    assert figures["mean_recall"].chance == pytest.approx((1 / 8 + 1 / 2) / 2)
    assert figures["mean_recall"].is_main
    both = (figures["a_accuracy"].value + figures["b_accuracy"].value) / 2
    assert figures["mean_recall"].value == pytest.approx(both)
    assert figures["mean_recall"].low is not None
    assert measured.result.num_units == 120
    assert measured.units is not None
    assert set(measured.units.ratios) == set(figures)
    again = RecallMeasure().reduce(config, setting(), results_of(config, setting(), Guesser(257, seed=1)))
    assert again.units is not None
    assert again.units.identity == measured.units.identity, "the same examples, so pairs can be compared"


def test_curves_are_by_distance() -> None:
    task = Mqar(kind="mqar", seq_len=200, min_distance=2)
    config = RecallConfig(suites={"mqar": task}, num_examples=80)
    of = setting(synthetic(task))
    documents = [task.draw(recall_work.generator(0, number)) for number in range(80)]

    class Near(Oracle):
        """Knows what is near: answers at most 64 tokens away."""

    near = [
        [99, *document.tokens[:at].tolist(), int(document.tokens[at]) if at - document.source[at] < 64 else 0]
        for document in documents
        for at in np.flatnonzero(document.is_answer)
    ]
    oracle = Oracle(100, [])
    oracle._next = {tuple(sequence[:-1]): sequence[-1] for sequence in near}
    results = {one.key: one.work.run(host(oracle)) for one in RecallMeasure().tasks(config, of)}
    (curve,) = RecallMeasure().reduce(config, of, results).result.curves
    assert curve.log_x
    assert [point.x for point in curve.points] == sorted(point.x for point in curve.points)
    assert all(point.y == (1.0 if point.x < 64 else 0.0) for point in curve.points)
    assert curve.mark is not None
    assert curve.mark.x == 64
    assert isinstance(documents[0], TaskSequence)


def test_a_model_of_a_tasks_ids_is_asked_that_task_by_default() -> None:
    task = Mqar(kind="mqar")
    assert RecallConfig().asked(setting(synthetic(task))) == {"mqar": task}
    longer = RecallConfig(suites={"longer": Mqar(kind="mqar", num_pairs=16, seq_len=256)})
    RecallMeasure().check(longer, setting(synthetic(task)))
    assert "mean_recall" in RecallMeasure().figure_names(longer, setting(synthetic(task)))


@pytest.mark.parametrize(
    ("suites", "source", "problem"),
    [
        ({"a": Memorization(kind="memorization")}, None, "asks for what only training"),
        ({"a": Mqar(kind="mqar", vocab_size=32)}, synthetic(Mqar(kind="mqar")), "has mqar with 32 ids"),
        ({"a": TextNeedle(kind="text_needle")}, synthetic(Mqar(kind="mqar")), "this suite has text"),
        (
            {"a": Memorization(kind="memorization", map_seed=1)},
            synthetic(Memorization(kind="memorization")),
            "map_seed=12345, and this suite has memorization with 254 ids, map_seed=1",
        ),
        ({"a": Mqar(kind="mqar")}, SimpleNamespace(kind="tokens"), "the tokens are neither"),
        (None, SimpleNamespace(kind="tokens"), "the tokens are neither"),
    ],
)
def test_suites_that_a_model_cannot_be_asked_are_errors(suites: Any, source: Any, problem: str) -> None:
    with pytest.raises(FieldError, match=problem):
        RecallMeasure().check(RecallConfig(suites=suites), setting(source))

"""The work of the measure `recall`: drawing examples, asking the model, adding up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.tasks.state_tracking import S5, Parity
from data.tasks.task import NO_SOURCE, Task
from data.tasks.text.example import NOWHERE, TextExample, TextTask
from data.tasks.text.rendered import Rendered
from pipelines.stages.evaluate.continuations import Continuation, score_continuations
from pipelines.stages.evaluate.language_model import beginning
from pipelines.stages.evaluate.measures.figures import figure_of, identity_of, point_of
from pipelines.stages.evaluate.measures.measure import Measured, Setting, Units
from pipelines.stages.evaluate.results import Curve, Figure, Mark, MeasureResult
from pipelines.stages.train.device import copy_to
from pipelines.stages.uncertainty import Ratio

if TYPE_CHECKING:
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.evaluate.language_model import LanguageModel, TextTokenizer
    from pipelines.stages.evaluate.measures.measure import TaskResult
    from pipelines.stages.evaluate.measures.recall import RecallConfig

_STREAM = 0x7EC411  # sets examples apart from the documents of a source with the same seed, which the model may know
_NO_DISTANCE = -1
_MIN_EXAMPLES = 5  # in a point of a curve


def generator(seed: int, number: int) -> np.random.Generator:
    """What an example is drawn with; the same for all suites."""
    return np.random.default_rng((seed, number, _STREAM))


@dataclass(frozen=True)
class AskInWords:
    """Examples of a suite for a model of text. Attributes: numbers: of the examples."""

    suite: Task | TextTask
    seed: int
    numbers: range
    num_shown: int
    num_choices: int

    def run(self, host: Host) -> TaskResult:
        """Returns: as `answers_in_words`, and `identity` of the examples."""
        drawn = list(self.examples(host.tokenizer))
        with host.autocast():
            found = answers_in_words(host.model, host.tokenizer, drawn, host.batch_tokens)
        return {**found, "identity": np.array(identity_of([[example.prompt, example.answer] for example in drawn]))}

    def examples(self, tokenizer: TextTokenizer) -> Iterator[TextExample]:
        """Draw them. Raises DataError: a length has no room for the question."""
        suite = self.suite
        task = suite if isinstance(suite, TextTask) else Rendered(suite, self.num_shown, self.num_choices)
        for number in self.numbers:
            yield task.draw(generator(self.seed, number), lambda text: len(tokenizer.encode_batch([text])[0]))


@dataclass(frozen=True)
class AskInIds:
    """Documents of a task for a model of its ids. Attributes: eod_id: the id before each document, as in training."""

    suite: Task
    seed: int
    numbers: range
    eod_id: int

    def run(self, host: Host) -> TaskResult:
        """Returns: as `answers_in_ids`, and `identity` of the documents."""
        documents = [self.suite.draw(generator(self.seed, number)) for number in self.numbers]
        with host.autocast():
            found = answers_in_ids(host.model, documents, self.eod_id, self.suite.chance, host.batch_tokens)
        return {**found, "identity": np.array(identity_of([document.tokens.tolist() for document in documents]))}


def answers_in_words(
    model: LanguageModel, tokenizer: TextTokenizer, examples: Sequence[TextExample], batch_tokens: int
) -> dict[str, np.ndarray]:
    """Ask a model which of the answers is likeliest, by the sum of its tokens' log-probabilities.

    Returns: of each answer (n): `example`, its number here; `right`, 1 if it is likelier than all others (a share of 1
        among equals); `exact`, whether greedy decoding writes it; `distance` in tokens from where it is written to
        where it is asked for, -1 if it is nowhere; `chance` of a guess.
    """
    start = beginning(tokenizer)
    texts: list[str] = []
    for prompt, answer, others, source in examples:
        texts += [prompt, prompt[: max(source, 0)], *(prompt + choice for choice in (answer, *others))]
    encoded = iter([*start, *ids.tolist()] for ids in tokenizer.encode_batch(texts))
    pairs: list[Continuation] = []
    distances: list[int] = []
    for example in examples:
        prompt_ids, before_ids = next(encoded), next(encoded)
        distances.append(_NO_DISTANCE if example.source == NOWHERE else len(prompt_ids) - len(before_ids))
        for _ in range(1 + len(example.others)):
            whole = next(encoded)
            pairs.append(Continuation(prompt_ids, whole[len(prompt_ids) :]))
    scores = iter(score_continuations(model, pairs, batch_tokens, model.max_tokens))
    right, exact, chance = [], [], []
    for example in examples:
        first, *rest = (next(scores) for _ in range(1 + len(example.others)))
        best = max([first.logprob, *(score.logprob for score in rest)])
        winners = sum(score.logprob == best for score in (first, *rest))
        right.append(1 / winners if first.logprob == best else 0.0)
        exact.append(first.is_greedy)
        chance.append(1 / (1 + len(example.others)))
    return {
        "example": np.arange(len(examples)),
        "right": np.array(right),
        "exact": np.array(exact),
        "distance": np.array(distances),
        "chance": np.array(chance),
    }


@torch.inference_mode()
def answers_in_ids(
    model: LanguageModel, documents: Sequence, eod_id: int, chance: float, batch_tokens: int
) -> dict[str, np.ndarray]:
    """Ask a model for every answer of documents: right if it is the likeliest of all ids.

    Returns: as answers_in_words, without `exact`.
    """
    order = sorted(range(len(documents)), key=lambda number: -len(documents[number].tokens))
    found: list[dict[str, np.ndarray]] = []
    while order:
        width = len(documents[order[0]].tokens)
        batch, order = order[: max(1, batch_tokens // width)], order[max(1, batch_tokens // width) :]
        tokens_bt = torch.full((len(batch), width), eod_id)
        wanted_bt = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, number in enumerate(batch):
            tokens = documents[number].tokens
            tokens_bt[row, 1 : len(tokens)] = torch.from_numpy(tokens[:-1])
            of_answers = documents[number].source
            wanted_bt[row, torch.from_numpy(of_answers[of_answers != NO_SOURCE] + 1)] = True
        rows = np.concatenate([np.full(documents[n].is_answer.sum(), row) for row, n in enumerate(batch)])
        at = np.concatenate([np.flatnonzero(documents[n].is_answer) for n in batch])
        targets = np.concatenate([documents[n].tokens[documents[n].is_answer] for n in batch])
        source = np.concatenate([documents[n].source[documents[n].is_answer] for n in batch])
        tokens_bt, wanted_bt = (copy_to(model.device, part) for part in (tokens_bt, wanted_bt))
        rows_s, at_s = (copy_to(model.device, torch.from_numpy(part)) for part in (rows, at))
        likeliest = model.logits_at(tokens_bt, rows_s, at_s, wanted_bt=wanted_bt).argmax(-1).cpu().numpy()
        found.append(
            {
                "example": np.array(batch)[rows],
                "right": (likeliest == targets).astype(float),
                "distance": np.where(source == NO_SOURCE, _NO_DISTANCE, at - source),
                "chance": np.full(len(at), chance),
            }
        )
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


@dataclass(frozen=True)
class _Suite:
    """All answers of a suite; `example` counts from 0 over its slices."""

    answers: Mapping[str, np.ndarray]
    num_examples: int

    def shares(self, name: str) -> Ratio:
        """Of each example the share of its answers with this property: every example counts the same."""
        counts = self._sums(np.ones(len(self.answers["example"])))
        return Ratio(self._sums(self.answers[name].astype(float)) / counts, np.ones(self.num_examples))

    def shares_at(self, is_there: np.ndarray) -> Ratio:
        """Of some answers only; examples without any are left out."""
        right, counts = (self._sums(np.where(is_there, values, 0)) for values in (self.answers["right"], is_there))
        return Ratio(right[counts > 0], counts[counts > 0])

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.answers["example"], weights=values, minlength=self.num_examples)


def measured(config: RecallConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
    """The figures of all suites together and of each, and each by distance."""
    figures: list[Figure] = []
    curves: list[Curve] = []
    ratios: dict[str, Ratio] = {}
    chances: list[float] = []
    suites = config.asked(setting)
    for name, suite in suites.items():
        of_suite = [result for key, result in results.items() if key.rpartition("-")[0] == name]
        found = _joined(of_suite)
        chance = float(found.answers["chance"].mean())
        chances.append(chance)
        ratios[f"{name}_accuracy"] = found.shares("right")
        figures.append(figure_of(f"{name}_accuracy", ratios[f"{name}_accuracy"], better="higher", chance=chance))
        if "exact" in found.answers:
            ratios[f"{name}_exact"] = found.shares("exact")
            figures.append(figure_of(f"{name}_exact", ratios[f"{name}_exact"], better="higher"))
        curves += _by_distance(name, suite, found, chance, setting.seq_len)
    together = [ratios[f"{name}_accuracy"] for name in suites]
    ratios["mean_recall"] = Ratio(
        np.concatenate([ratio.numerator_n for ratio in together]),
        np.concatenate([ratio.denominator_n for ratio in together]),
    )
    mean = figure_of(
        "mean_recall", ratios["mean_recall"], better="higher", chance=float(np.mean(chances)), is_main=True
    )
    return Measured(
        MeasureResult(
            name=config.called,
            kind=config.kind,
            unit="example",
            num_units=len(ratios["mean_recall"].numerator_n),
            figures=(mean, *figures),
            curves=tuple(curves),
            notes=_notes(setting),
        ),
        Units(identity_of([str(result["identity"]) for result in results.values()]), ratios),
    )


def _joined(results: Sequence[TaskResult]) -> _Suite:
    first = 0
    numbers = []
    for result in results:
        numbers.append(result["example"] + first)
        first += int(result["example"].max()) + 1
    names = [name for name in results[0] if name not in ("example", "identity")]
    answers = {name: np.concatenate([result[name] for result in results]) for name in names}
    return _Suite({**answers, "example": np.concatenate(numbers)}, first)


def _by_distance(name: str, suite: Task | TextTask, found: _Suite, chance: float, seq_len: int) -> list[Curve]:
    """Accuracy in bins from one power of two to the next; none if there are fewer than two."""
    distance = found.answers["distance"]
    known = distance[distance > 0]
    if not len(known):
        return []
    points = []
    for power in range(int(known.max()).bit_length()):
        is_there = (distance >= 1 << power) & (distance < 2 << power)
        ratio = found.shares_at(is_there)
        if len(ratio.numerator_n) >= _MIN_EXAMPLES:
            points.append(point_of(float(distance[is_there].mean()), ratio))
    if len(points) < 2:
        return []
    what = "length of what is tracked" if isinstance(suite, Parity | S5) else "distance of what is asked for"
    return [
        Curve(
            name=f"{name}_by_distance",
            title=f"{name}: accuracy by {what.split(' ')[0]}",
            x_label=f"{what} (tokens)",
            y_label="share of answers right",
            points=tuple(points),
            mark=Mark(x=float(seq_len), label="training length"),
            log_x=True,
            note=f"Guessing gets {chance:.1%}.",
        )
    ]


def _notes(setting: Setting) -> tuple[str, ...]:
    if setting.is_text:
        return (
            "Accuracy: the right answer is likelier than wrong ones of the same kind, most of which stand in the "
            "prompt too. Exact: greedy decoding writes it.",
        )
    return ("Accuracy: the answer is the likeliest of all ids. The documents are new ones of the task.",)

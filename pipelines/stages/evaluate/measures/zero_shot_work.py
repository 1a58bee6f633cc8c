"""The work of the measure `zero_shot`: what the model is asked, its answers, and what lm-eval makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from base.errors import UserError
from pipelines.stages.evaluate.harness.tasks import Example, LoadedTask, Metric, load_tasks, metrics_of
from pipelines.stages.evaluate.measures.figures import figure_of, identity_of, text_array, texts_of
from pipelines.stages.evaluate.measures.measure import Measured, Units
from pipelines.stages.evaluate.results import Figure, MeasureResult
from pipelines.stages.uncertainty import Ratio

if TYPE_CHECKING:
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.evaluate.measures.measure import TaskResult
    from pipelines.stages.evaluate.measures.zero_shot import ZeroShotConfig

_MAIN = ("acc_norm", "acc", "contains", "exact_match")  # the first that a task has goes into a report's first table


@dataclass(frozen=True)
class AskModel:
    """Requests of lm-eval: their types with their arguments. Whoever answers needs neither tasks nor data sets."""

    requests: tuple[tuple[str, tuple[Any, ...]], ...]
    max_tokens: int

    def run(self, host: Host) -> TaskResult:
        """Returns: of each request `logprob`, `is_greedy` and `texts`; where one means nothing, 0 or an empty text."""
        from lm_eval.api.instance import Instance

        from pipelines.stages.evaluate.harness.lm import HarnessLM

        lm = HarnessLM(host.model, host.tokenizer, host.batch_tokens, self.max_tokens)
        logprobs, greedy = np.zeros(len(self.requests)), np.zeros(len(self.requests), bool)
        texts = [""] * len(self.requests)
        with host.autocast():
            for kind in sorted({kind for kind, _ in self.requests}):
                numbers = [number for number, (of_kind, _) in enumerate(self.requests) if of_kind == kind]
                asked = [Instance(kind, {}, self.requests[number][1], 0) for number in numbers]
                for number, answer in zip(numbers, getattr(lm, kind)(asked, disable_tqdm=True), strict=True):
                    if kind == "generate_until":
                        texts[number] = answer
                    elif kind == "loglikelihood":
                        logprobs[number], greedy[number] = answer
                    else:
                        logprobs[number] = answer
        return {"logprob": logprobs, "is_greedy": greedy, "texts": text_array(texts), "asked": self.identity()}

    def identity(self) -> np.ndarray:
        """Digest of the requests, as an array, so that a kept result is known to answer them."""
        return np.array(identity_of([[kind, repr(arguments)] for kind, arguments in self.requests]))


def slices(config: ZeroShotConfig, examples_per_task: int) -> Iterator[tuple[str, AskModel]]:
    """Keys of tasks with their work."""
    for loaded in _loaded(config):
        for key, examples in _cut(loaded, examples_per_task):
            yield key, _asked(config, examples)


def measured(config: ZeroShotConfig, results: Mapping[str, TaskResult], examples_per_task: int) -> Measured:
    """The figures of all tasks. Raises UserError: the examples are not those that were asked."""
    figures: list[Figure] = []
    ratios: dict[str, Ratio] = {}
    notes = [_source(config)]
    identities = []
    num_examples = 0
    for loaded in _loaded(config):
        metrics, remarks = metrics_of(loaded, _responses(config, loaded, results, examples_per_task))
        notes += remarks
        num_examples += len(loaded.examples)
        identities.append(loaded.identity())
        main = next((name for name in _MAIN if name in metrics), None)
        for name, metric in metrics.items():
            ratio = Ratio(metric.numerator_n, metric.denominator_n)
            ratios[f"{loaded.name}_{name}"] = ratio
            figures.append(_figure(f"{loaded.name}_{name}", metric, ratio, name == main))
    return Measured(
        MeasureResult(
            name=config.called,
            kind=config.kind,
            unit="example",
            num_units=num_examples,
            figures=tuple(figures),
            notes=tuple(notes),
        ),
        Units(identity_of(identities), ratios),
    )


@lru_cache(maxsize=2)
def _loaded(config: ZeroShotConfig) -> tuple[LoadedTask, ...]:
    """The tasks: `tasks` and `reduce` need them, and lm-eval takes seconds to list all it knows."""
    return tuple(load_tasks(config.tasks, config.folder, config.limit, config.num_fewshot))


def _cut(loaded: LoadedTask, examples_per_task: int) -> Iterator[tuple[str, Sequence[Example]]]:
    for first in range(0, len(loaded.examples), examples_per_task):
        yield f"{loaded.name}-{first:06d}", loaded.examples[first : first + examples_per_task]


def _asked(config: ZeroShotConfig, examples: Sequence[Example]) -> AskModel:
    requests = tuple((request.request_type, request.args) for example in examples for request in example.requests)
    return AskModel(requests, config.max_tokens)


def _responses(
    config: ZeroShotConfig, loaded: LoadedTask, results: Mapping[str, TaskResult], examples_per_task: int
) -> dict[int, list[Any]]:
    """Of each example, one per request, as lm-eval has them."""
    responses: dict[int, list[Any]] = {}
    for key, examples in _cut(loaded, examples_per_task):
        result = results[key]
        if str(result["asked"]) != str(_asked(config, examples).identity()):
            raise UserError(
                f"measure {config.called}: the data of {loaded.name} changed while it was evaluated. Leave it alone, "
                "and give the measure another name to evaluate it again."
            )
        texts = texts_of(result["texts"])
        at = 0
        for example in examples:
            answers: list[Any] = []
            for request in example.requests:
                logprob = float(result["logprob"][at])
                if request.request_type == "generate_until":
                    answers.append(texts[at])
                elif request.request_type == "loglikelihood":
                    answers.append((logprob, bool(result["is_greedy"][at])))
                else:
                    answers.append(logprob)
                at += 1
            responses[example.number] = answers
    return responses


def _figure(name: str, metric: Metric, ratio: Ratio, is_main: bool) -> Figure:
    return figure_of(
        name, ratio, metric.transform, unit=metric.unit, better=metric.better, chance=metric.chance, is_main=is_main
    )


def _source(config: ZeroShotConfig) -> str:
    shots = f"{config.num_fewshot} solved examples before each" if config.num_fewshot else "no solved examples"
    first = "" if config.limit is None else f", the first {config.limit} examples of each task"
    data = "data from the Hugging Face hub" if config.data is None else f"examples from {config.data}"
    return f"lm-eval {version('lm-eval')}, {data}, {shots}{first}."

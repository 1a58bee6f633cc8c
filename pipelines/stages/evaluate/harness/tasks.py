"""The requests of lm-eval tasks, and what the answers to them say about each example.

Requests are made where the data is, in the stage's own process; whoever holds the model needs only texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from base.digest import digest_of
from base.errors import UserError
from data.errors import SourceUnavailableError
from data.sources.hub import is_away
from pipelines.stages.evaluate.harness.local_tasks import examples_file, local_task, read_examples

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

FEWSHOT_SEED = 1234  # lm-eval's default
_LN2 = math.log(2)


class Metric(NamedTuple):
    """One metric of a task, of every example: value = transform(sum of numerators / sum of denominators)."""

    numerator_n: np.ndarray
    denominator_n: np.ndarray
    transform: Literal["identity", "exp"] = "identity"
    better: Literal["lower", "higher"] = "higher"
    unit: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class Example:
    """An example's requests, in lm-eval's order."""

    number: int
    requests: Sequence[Instance]


@dataclass(frozen=True)
class LoadedTask:
    """A task with its requests."""

    name: str
    task: Task
    examples: Sequence[Example] = field(default_factory=list)

    def identity(self) -> str:
        """Digest of what the model is asked, in order."""
        return digest_of([self.name, *(str(request.args) for example in self.examples for request in example.requests)])


def load_tasks(names: Sequence[str], folder: Path | None, limit: int | None, num_fewshot: int) -> list[LoadedTask]:
    """Load tasks and make their requests, examples in lm-eval's order.

    Args:
        folder: with a file of examples for each task; None: lm-eval's own definitions, with data from the hub.
        limit: examples of each task, at most.
    Raises: UserError: a task is not known, or its data cannot be loaded. DataError: a file of examples is wrong.
        SourceUnavailableError: the hub cannot be reached.
    """
    found: list[tuple[str, Task]] = []
    if folder is None:
        found += _from_the_hub(names, num_fewshot)
    else:
        for name in names:
            file = examples_file(folder, name)
            if file is None:
                raise UserError(f"{folder} has no examples of {name}: expected {name}.jsonl or {name}.jsonl.gz.")
            found.append((name, local_task(name, read_examples(file), num_fewshot)))
    return [_with_requests(name, task, limit) for name, task in found]


def metrics_of(loaded: LoadedTask, responses: Mapping[int, Sequence[Any]]) -> tuple[dict[str, Metric], list[str]]:
    """What lm-eval makes of the answers, example by example, and notes on what has no value per example.

    Args: responses: of each example, by its number, one per request: (log-probability, is greedy), a log-probability,
        or a text.
    """
    task = loaded.task
    for example in loaded.examples:
        for request, response in zip(example.requests, responses[example.number], strict=True):
            request.resps = [response]
            request.filtered_resps = {}
    task.apply_filters()
    values: dict[str, list[Any]] = {}
    for example in loaded.examples:
        several = len(example.requests[0].filtered_resps) > 1
        for key in example.requests[0].filtered_resps:
            results = [request.filtered_resps[key] for request in example.requests]
            for name, value in task.process_results(example.requests[0].doc, results).items():
                values.setdefault(f"{name}_{key}" if several else name, []).append(value)
    metrics: dict[str, Metric] = {}
    notes: list[str] = []
    chance = _chance(loaded)
    for name, of_examples in values.items():
        base = next(known for known in (name, name.rpartition("_")[0]) if known in task.aggregation())
        kind = getattr(task.aggregation()[base], "__name__", "")
        better: Literal["lower", "higher"] = "higher" if task.higher_is_better().get(base, True) else "lower"
        metric = _AGGREGATIONS[kind](of_examples) if kind in _AGGREGATIONS else None
        if metric is None or len(of_examples) != len(loaded.examples):
            notes.append(f"{loaded.name}: {name} is no mean over examples ({kind}), so it is left out.")
            continue
        metrics[name] = metric._replace(better=better, chance=chance if base in ("acc", "acc_norm") else None)
    if bits := _bits(loaded, responses):
        metrics["bits_per_byte"] = bits
    return metrics, notes


def _from_the_hub(names: Sequence[str], num_fewshot: int) -> Iterator[tuple[str, Task]]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"lm-eval knows no task {', '.join(map(repr, unknown))}. `lm-eval ls tasks` lists those it knows; `data` "
            "names a folder with examples of your own."
        )
    try:
        tasks: dict[str, Task] = manager.load(list(names))["tasks"]
    except Exception as error:  # many libraries; a missing network, a data set that moved, a package that is not there
        kind = SourceUnavailableError if is_away(error) else UserError
        raise kind(
            f"lm-eval could not load {', '.join(names)}: {type(error).__name__}: {str(error).rstrip('.')}. Its data "
            "comes from the Hugging Face hub; where there is no network, set `data` to a folder with the examples."
        ) from error
    for name, task in tasks.items():
        if num_fewshot and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        yield name, task


def _with_requests(name: str, task: Task, limit: int | None) -> LoadedTask:
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    of_examples: dict[int, list[Instance]] = {}
    for request in task.instances:
        of_examples.setdefault(request.doc_id, []).append(request)
    examples = [
        Example(number, sorted(requests, key=lambda request: request.idx)) for number, requests in of_examples.items()
    ]
    return LoadedTask(name, task, examples)


def _chance(loaded: LoadedTask) -> float | None:
    """Share of the examples that a guess among the choices gets right."""
    if loaded.task.OUTPUT_TYPE != "multiple_choice":
        return None
    return float(np.mean([1 / len(loaded.task.doc_to_choice(example.requests[0].doc)) for example in loaded.examples]))


def _bits(loaded: LoadedTask, responses: Mapping[int, Sequence[Any]]) -> Metric | None:
    """Bits per byte of the right answer: tells models apart long before they choose better than chance."""
    if loaded.task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return None
    nats, num_bytes = [], []
    for example in loaded.examples:
        right = _right(loaded.task, example)
        if right is None:
            return None
        nats.append(-responses[example.number][right][0])
        num_bytes.append(len(example.requests[right].args[1].encode()))
    return Metric(
        np.array(nats) / _LN2, np.array(num_bytes, float), better="lower", unit="bits per byte of the right answer"
    )


def _right(task: Task, example: Example) -> int | None:
    """Number of the request for the right answer; None: several are right, or it cannot be told."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    doc = example.requests[0].doc
    gold = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    if isinstance(gold, str):
        choices = task.doc_to_choice(doc)
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(example.requests) else None


def _mean(values: Sequence[Any]) -> Metric | None:
    if not all(isinstance(value, int | float | np.number) for value in values):
        return None
    return Metric(np.array(values, float), np.ones(len(values)))


def _perplexity(values: Sequence[float]) -> Metric:
    return Metric(-np.array(values, float), np.ones(len(values)), "exp", unit="per target")


def _weighted(transform: Literal["identity", "exp"], scale: float, unit: str) -> Callable[[Sequence[Any]], Metric]:
    def metric(values: Sequence[tuple[float, float]]) -> Metric:
        nats, weights = np.array(values, float).T
        return Metric(-nats / scale, weights, transform, unit=unit)

    return metric


_AGGREGATIONS: Mapping[str, Callable[[Sequence[Any]], Metric | None]] = {
    "mean": _mean,
    "perplexity": _perplexity,
    "weighted_perplexity": _weighted("exp", 1.0, ""),
    "bits_per_byte": _weighted("identity", _LN2, "bits per byte"),
}
"""How lm-eval adds up a metric, by the name of its function."""

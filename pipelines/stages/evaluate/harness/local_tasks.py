"""lm-eval tasks out of local files of examples, in the four forms that zero-shot sets come in.

One JSON object per line, also gzipped. No context ends with a blank and no answer begins with one; exactly one blank
joins them.

| fields                              | lm-eval type    | metrics                                               |
|-------------------------------------|-----------------|-------------------------------------------------------|
| `context`, `target`                 | loglikelihood   | `acc`: greedy decoding writes the target; perplexity  |
| `context`, `choices`, `label`       | multiple_choice | `acc`; `acc_norm`: log-probability per character      |
| `contexts`, `continuation`, `label` | multiple_choice | `acc`: behind which context it is likelier            |
| `context`, `answers`                | generate_until  | `contains`: the next line has an answer, in any case  |
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.errors import DataError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

SUFFIXES = (".jsonl", ".jsonl.gz")
FILE_OF_TASK = {"lambada_openai": "lambada"}  # files named otherwise than the task
MAX_ANSWER_TOKENS = 48  # as lm-eval's FDA, SWDE and SQuAD generate
SPLIT = "test"

Row = Mapping[str, Any]


class Form(NamedTuple):
    """A form of examples.

    Attributes:
        fields: of an example.
        fits: whether they have the right types.
        figures: metrics of it (pipelines.stages.evaluate.harness.tasks adds bits_per_byte).
        config: the rest of lm-eval's TaskConfig.
    """

    fields: frozenset[str]
    fits: Callable[[Row], bool]
    figures: tuple[str, ...]
    config: dict[str, Any]


def examples_file(folder: Path, task: str) -> Path | None:
    """The file of a task; None if there is none."""
    names = [f"{stem}{suffix}" for stem in (task, FILE_OF_TASK.get(task, task)) for suffix in SUFFIXES]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_examples(file: Path) -> list[dict[str, Any]]:
    """The examples of a file, all of one form. Raises DataError: names the line and what is wrong with it."""
    rows: list[dict[str, Any]] = []
    form: Form | None = None
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not JSON: {error}. Expected one JSON object per line.") from error
        form = form or _form_of(row)
        if form is None or not isinstance(row, dict) or not form.fields <= row.keys() or not form.fits(row):
            raise DataError(
                f"{file}, line {number}: expected an object with {_described(form)}; labels are indices of choices or "
                "contexts, and no text is empty."
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{file}: no examples. Expected one JSON object per line.")
    return rows


def form_of_file(file: Path) -> Form:
    """The form of a file, by its first example. Raises DataError: it has none."""
    row = next((json.loads(line) for line in _lines(file) if line.strip()), None)
    form = _form_of(row)
    if form is None:
        raise DataError(f"{file}: the first example has none of the known forms: {_described(None)}.")
    return form


def local_task(name: str, rows: Sequence[Row], num_fewshot: int = 0) -> ConfigurableTask:
    """The examples as a task of lm-eval. Few-shot examples are drawn from the others."""
    from lm_eval.api.task import ConfigurableTask

    form = _form_of(rows[0])
    assert form is not None, "read_examples refuses other rows"
    config = {
        "task": name,
        "custom_dataset": _Rows(rows),
        "test_split": SPLIT,
        "fewshot_split": SPLIT,  # so that the example itself is not among them
        "num_fewshot": num_fewshot,
        **form.config,
    }
    return ConfigurableTask(config=config)


class _Rows:
    """What lm-eval calls for a data set."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [dict(row) for row in rows]

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {SPLIT: Dataset.from_list(self._rows)}


def _lines(file: Path) -> Iterator[str]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            yield from stream
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}. Copy it again.") from error


def _form_of(row: Any) -> Form | None:
    keys = row.keys() if isinstance(row, dict) else set()
    return next((form for form in FORMS if form.fields <= keys), None)


def _described(form: Form | None) -> str:
    forms = FORMS if form is None else (form,)
    return " or ".join(", ".join(sorted(form.fields)) for form in forms)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_label(value: Any, choices: Sequence[str]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices)


def _contains(row: Row, results: Sequence[str]) -> dict[str, float]:
    found = any(re.search(re.escape(answer), results[0], re.IGNORECASE) for answer in row["answers"])
    return {"contains": float(found)}


def _metrics(**higher_is_better: bool) -> list[dict[str, Any]]:
    return [
        {"metric": name, "aggregation": name if name == "perplexity" else "mean", "higher_is_better": higher}
        for name, higher in higher_is_better.items()
    ]


FORMS = (
    Form(
        frozenset({"contexts", "continuation", "label"}),
        lambda row: (
            _are_texts(row["contexts"]) and _is_text(row["continuation"]) and _is_label(row["label"], row["contexts"])
        ),
        ("acc", "bits_per_byte"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": lambda row: row["label"],
            "doc_to_choice": lambda row: row["contexts"],
            "doc_to_target": lambda row: row["continuation"],
            "metric_list": _metrics(acc=True),
        },
    ),
    Form(
        frozenset({"context", "choices", "label"}),
        lambda row: _is_text(row["context"]) and _are_texts(row["choices"]) and _is_label(row["label"], row["choices"]),
        ("acc", "acc_norm", "bits_per_byte"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": lambda row: row["context"],
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["label"],
            "metric_list": _metrics(acc=True, acc_norm=True),
        },
    ),
    Form(
        frozenset({"context", "target"}),
        lambda row: _is_text(row["context"]) and _is_text(row["target"]),
        ("perplexity", "acc", "bits_per_byte"),
        {
            "output_type": "loglikelihood",
            "doc_to_text": lambda row: row["context"],
            "doc_to_target": lambda row: f" {row['target']}",
            "fewshot_config": {"target_delimiter": ""},  # the target has it
            "metric_list": _metrics(perplexity=False, acc=True),
        },
    ),
    Form(
        frozenset({"context", "answers"}),
        lambda row: _is_text(row["context"]) and _are_texts(row["answers"]),
        ("contains",),
        {
            "output_type": "generate_until",
            "doc_to_text": lambda row: row["context"],
            "doc_to_target": lambda row: row["answers"][0],
            "process_results": _contains,
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": MAX_ANSWER_TOKENS, "do_sample": False},
            "metric_list": _metrics(contains=True),
        },
    ),
)

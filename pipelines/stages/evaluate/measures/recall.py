"""Recall and state tracking: what a model can find again in its context, and how far back.

A model of text is asked in words. A model that was trained on a task's token ids is asked with new documents of that
task, also with other lengths and numbers of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from data.config import SyntheticSource
from data.tasks import AnyTask
from data.tasks.drifting import DriftingRecall
from data.tasks.mad import Compression, FuzzyRecall, InContextRecall, Memorization, NoisyRecall, SelectiveCopying
from data.tasks.mqar import Mqar
from data.tasks.retrieval import Needle, Phonebook
from data.tasks.state_tracking import S5, Parity
from data.tasks.task import Task as IdTask
from data.tasks.text.example import TextTask
from data.tasks.text.extraction import Extraction
from data.tasks.text.needle import TextNeedle
from data.tasks.text.phonebook import TextPhonebook
from pipelines.errors import FieldError
from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult

EXAMPLES_PER_TASK = 50
_MIN_PROMPT_TOKENS = 512  # of the default suites: RULER's words alone take a hundred or two

AnySuite = Annotated[
    Mqar
    | InContextRecall
    | NoisyRecall
    | FuzzyRecall
    | SelectiveCopying
    | Compression
    | Memorization
    | S5
    | Parity
    | Needle
    | Phonebook
    | DriftingRecall
    | TextNeedle
    | TextPhonebook
    | Extraction,
    Field(discriminator="kind"),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]


def text_suites(num_tokens: int) -> dict[str, AnyTask | TextTask]:
    """What a model of text is asked by default. Args: num_tokens: of the prompts whose length can be chosen."""
    return {
        "niah_single": TextNeedle(kind="text_needle", num_tokens=num_tokens),
        "niah_multikey": TextNeedle(kind="text_needle", num_tokens=num_tokens, num_keys=4),
        "niah_multivalue": TextNeedle(kind="text_needle", num_tokens=num_tokens, num_values=4),
        "niah_needles": TextNeedle(kind="text_needle", num_tokens=num_tokens, haystack="needles"),
        "phonebook": TextPhonebook(kind="text_phonebook"),
        "extraction": Extraction(kind="extraction", num_tokens=num_tokens),
        "mqar": Mqar(kind="mqar"),
        "in_context_recall": InContextRecall(kind="in_context_recall", num_pairs=32),
        "noisy_recall": NoisyRecall(kind="noisy_recall", num_pairs=32),
        "fuzzy_recall": FuzzyRecall(kind="fuzzy_recall", num_keys=4, num_pairs=16),
        "selective_copying": SelectiveCopying(kind="selective_copying", num_copied=8, num_blanks=24),
        "compression": Compression(kind="compression", num_tokens=8),
        "parity": Parity(kind="parity", max_length=16),
        "s5": S5(kind="s5", max_length=8),
    }


class RecallConfig(MeasureConfig):
    """Questions whose answers are in the context, by suite."""

    kind: Literal["recall"] = "recall"
    suites: dict[Name, AnySuite] | None = Field(
        None,
        min_length=1,
        description="What is asked, by a name for its figures. A task of token ids is written in words for a model of "
        "text. null: of a model of text, each kind once; of a model of a task's ids, that task.",
    )
    num_examples: int = Field(200, ge=1, description="Examples of each suite.")
    num_shown: int = Field(
        2, ge=0, description="Whole documents before the one that is asked about, of tasks of token ids in words."
    )
    num_choices: int = Field(
        8, ge=2, description="Answers that the likeliest one is taken of, of tasks of token ids in words."
    )
    seed: int = Field(0, ge=0, description="Seed of the examples.")

    def asked(self, setting: Setting) -> Mapping[str, AnyTask | TextTask]:
        """The suites. Empty: these tokens are neither text nor a task."""
        if self.suites is not None:
            return self.suites
        if setting.is_text:
            return text_suites(max(setting.seq_len, _MIN_PROMPT_TOKENS))
        task = trained_task(setting)
        return {} if task is None else {task.kind: task}


class RecallMeasure(Measure[RecallConfig]):
    """A task of the measure is a slice of the examples of one suite."""

    def check(self, config: RecallConfig, setting: Setting) -> None:
        """Refuse suites that this model cannot be asked."""
        trained = trained_task(setting)
        if not setting.is_text and trained is None:
            raise FieldError(
                ("kind",), "recall asks in words or in a task's ids, and the tokens are neither. Remove it."
            )
        for name, suite in (config.suites or {}).items():
            if setting.is_text:
                if isinstance(suite, IdTask) and not suite.in_context:
                    raise FieldError(
                        ("suites", name), f"{suite.kind} asks for what only training on it teaches. Remove it."
                    )
            elif trained is not None and _vocabulary(suite) != _vocabulary(trained):
                raise FieldError(
                    ("suites", name),
                    f"the model reads the ids of {_vocabulary(trained)}, and this suite has {_vocabulary(suite)}. Only "
                    "lengths and numbers of pairs may differ from what it was trained on.",
                )

    def figure_names(self, config: RecallConfig, setting: Setting) -> frozenset[str]:
        """`mean_recall` over all, `<suite>_accuracy` and, of text, `<suite>_exact`."""
        endings = ("accuracy", "exact") if setting.is_text else ("accuracy",)
        return frozenset({"mean_recall", *(f"{name}_{end}" for name in config.asked(setting) for end in endings)})

    def tasks(self, config: RecallConfig, setting: Setting) -> list[Task]:
        """Slices of the examples of each suite."""
        from pipelines.stages.evaluate.measures.recall_work import AskInIds, AskInWords

        tasks = []
        for name, suite in config.asked(setting).items():
            for first in range(0, config.num_examples, EXAMPLES_PER_TASK):
                numbers = range(first, min(first + EXAMPLES_PER_TASK, config.num_examples))
                work: AskInIds | AskInWords
                if isinstance(suite, IdTask) and not setting.is_text:
                    work = AskInIds(suite, config.seed, numbers, setting.tokens[0].output.eod_id)
                else:
                    work = AskInWords(suite, config.seed, numbers, config.num_shown, config.num_choices)
                tasks.append(Task(f"{name}-{first:06d}", work, setting.config.resources))
        return tasks

    def reduce(self, config: RecallConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """Accuracies with what guessing gets, and by distance."""
        from pipelines.stages.evaluate.measures.recall_work import measured

        return measured(config, setting, results)


def trained_task(setting: Setting) -> AnyTask | None:
    """The task whose ids the tokens are."""
    source = setting.tokens[0].config.source
    return source.task if isinstance(source, SyntheticSource) else None


def _vocabulary(suite: AnyTask | TextTask) -> str:
    """What a model's embeddings are of."""
    if isinstance(suite, TextTask):
        return "text"
    weights = f", map_seed={suite.map_seed}" if isinstance(suite, Memorization) else ""
    return f"{suite.kind} with {suite.num_ids} ids{weights}"

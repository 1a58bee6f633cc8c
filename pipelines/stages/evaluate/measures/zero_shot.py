"""Zero-shot and few-shot tasks of lm-eval, in process: LAMBADA, HellaSwag, PIQA, ARC, WinoGrande and its others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data.paths import expanded
from data.sources.digests import identity_of
from pipelines.engine.stage import Content
from pipelines.errors import FieldError
from pipelines.stages.evaluate.harness.local_tasks import examples_file, form_of_file
from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task
from pipelines.stages.tasks import user_errors

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult

EXAMPLES_PER_TASK = 256
PAPER = (
    "lambada_openai",
    "hellaswag",
    "piqa",
    "arc_easy",
    "arc_challenge",
    "winogrande",
)  # of B'MOJO's zero-shot table


class ZeroShotConfig(MeasureConfig):
    """Tasks of lm-eval. Their data comes from the Hugging Face hub, or from files."""

    kind: Literal["zero_shot"] = "zero_shot"
    tasks: tuple[str, ...] = Field(
        PAPER, min_length=1, description="Names of lm-eval's tasks, such as `piqa`; of files, if `data` is set."
    )
    data: str | None = Field(
        None,
        description="Folder with the examples of each task, in <task>.jsonl or <task>.jsonl.gz (of lambada_openai also "
        "in lambada.jsonl); null: lm-eval fetches them from the hub.",
    )
    limit: int | None = Field(None, ge=1, description="Examples of each task, the first ones; null: all.")
    num_fewshot: int = Field(0, ge=0, description="Solved examples before each one that is asked.")
    max_tokens: int = Field(
        2048, ge=2, description="Longest text that the model reads; what is further back is cut off, as in lm-eval."
    )

    @property
    def folder(self) -> Path | None:
        """The folder of `data`."""
        return None if self.data is None else expanded(self.data, "data")


class ZeroShotMeasure(Measure[ZeroShotConfig]):
    """Requests are made in the stage's own process; a task of the measure is a slice of the examples of one task."""

    def check(self, config: ZeroShotConfig, setting: Setting) -> None:
        """Refuse token ids that are no text, a missing lm-eval, a task twice and missing files."""
        if not setting.is_text:
            raise FieldError(("kind",), "zero_shot asks in words, and the tokens of this stage are no text. Remove it.")
        if find_spec("lm_eval") is None:
            raise FieldError(("kind",), "zero_shot needs the package lm-eval: pip install 'bmojo-pipeline[hf]'.")
        twice = next((name for name in config.tasks if config.tasks.count(name) > 1), None)
        if twice is not None:
            raise FieldError(("tasks",), f"{twice!r} is there twice; name it once.")
        folder = config.folder
        if folder is None:
            return
        if not folder.is_dir():
            raise FieldError(("data",), f"there is no folder {folder} (from {Path.cwd()}).")
        for name in config.tasks:
            if examples_file(folder, name) is None:
                raise FieldError(
                    ("data",), f"{folder} has no {name}.jsonl or {name}.jsonl.gz. Take {name!r} out of tasks."
                )

    def figure_names(self, config: ZeroShotConfig, setting: Setting) -> frozenset[str] | None:
        """`<task>_<metric>` of local files; of the hub's tasks only lm-eval knows them."""
        folder = config.folder
        if folder is None:
            return None
        files = {name: examples_file(folder, name) for name in config.tasks}
        return frozenset(
            f"{name}_{metric}" for name, file in files.items() if file for metric in form_of_file(file).figures
        )

    def local_paths(self, config: ZeroShotConfig) -> Sequence[str]:
        """The folder."""
        return () if config.data is None else (config.data,)

    def content(self, config: ZeroShotConfig) -> Content | None:
        """Digest of the files."""
        folder = config.folder
        if folder is None:
            return None
        return identity_of([file for name in config.tasks if (file := examples_file(folder, name)) is not None])

    def tasks(self, config: ZeroShotConfig, setting: Setting) -> list[Task]:
        """Slices of the examples of each task. Raises UserError: lm-eval does not know a task, or cannot load it."""
        from pipelines.stages.evaluate.measures.zero_shot_work import slices

        with user_errors():
            return [Task(key, work, setting.config.resources) for key, work in slices(config, EXAMPLES_PER_TASK)]

    def reduce(self, config: ZeroShotConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """What lm-eval makes of the answers."""
        from pipelines.stages.evaluate.measures.zero_shot_work import measured

        with user_errors():
            return measured(config, results, EXAMPLES_PER_TASK)

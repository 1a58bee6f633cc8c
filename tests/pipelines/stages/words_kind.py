"""A kind of stage that the program does not know, added to STAGES as CONTRIBUTING says, and then the `bmojo` command.

python -m tests.pipelines.stages.words_kind plan|run|status|schema ...
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

import pipelines.stages
from pipelines.engine.stage import (
    Estimate,
    Machines,
    ProgressMetrics,
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.errors import FieldError
from pipelines.storage.artifact import ArtifactDir


class WordsConfig(StageConfig):
    """Count the words of a text file."""

    kind: Literal["words"]
    file: str = Field(description="The text file.")
    at_least: int = Field(1, ge=1, description="Count words of so many letters or more.")


class WordsOutput(StageOutput):
    words: int

    def summary(self) -> str:
        return f"{self.words} words, as status shows them"

    def figures(self) -> dict[str, float]:
        return {"words/counted": self.words}


@dataclass(frozen=True)
class WordsInputs(StageInputs):
    shorter: StageNode[WordsStage] | None = None


class WordsStage(Stage[WordsConfig, WordsInputs, WordsOutput]):
    code_version = 1
    progress = ProgressMetrics("words/lines_total", {"words/counted": "{:.0f} words"})
    uses_cluster = False

    def content_identity(self, config: WordsConfig) -> str:
        return Path(config.file).read_text()

    def check(self, name: str, config: WordsConfig, inputs: WordsInputs) -> None:
        if inputs.shorter and config.at_least < inputs.shorter.config.at_least:
            raise FieldError(
                ("stages", name, "at_least"), f"found {config.at_least}, less than {inputs.shorter.name}'s."
            )

    def run(self, config: WordsConfig, inputs: WordsInputs, context: StageContext) -> WordsOutput:
        lines = Path(config.file).read_text().splitlines()
        context.journal.log_metrics(0, {"words/lines_total": len(lines)})
        words = sum(len(word) >= config.at_least for line in lines for word in line.split())
        if inputs.shorter:
            assert words <= inputs.shorter.output.words
        context.journal.log_metrics(len(lines), {"words/counted": words})
        return WordsOutput(words=words)

    def headline(self, config: WordsConfig, output: WordsOutput, artifact: ArtifactDir) -> str:
        return f"[bold]{output.words} words[/] in {artifact.relpath.partition('/')[0]}"

    def estimate(self, stages: Sequence[StageNode[Self]], machines: Machines) -> Sequence[Estimate]:
        rows = [(node.name, str(node.config.at_least)) for node in stages]
        return [Estimate(("words stage", "letters"), rows, ["Soon."])]


if __name__ == "__main__":
    importlib.import_module("tests.pipelines.stages.words_kind")  # under its real name, as the stage's process finds it
    from pipelines.cli.app import main

    main()
else:
    pipelines.stages.STAGES += (WordsStage(),)

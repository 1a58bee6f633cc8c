"""The `python` stage: a function of the user's as a durable stage.

In the artifact: source/ (what ran, as it was when the run was planned), files/ (what the function wrote), log.txt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape

from pipelines.engine.stage import AnyNode, NamedInputs, ProgressMetrics, Stage, StageContext
from pipelines.stages.python.config import PythonStageConfig
from pipelines.stages.python.output import PythonOutput
from pipelines.stages.python.running import PROGRESS_TOTAL, Input
from pipelines.stages.python.sources import find_sources
from pipelines.stages.python.task import LOG_FILE, SOURCE_FOLDER, Call, call_function
from pipelines.stages.tasks import require_planned_content, run_tasks
from pipelines.storage.artifact import ArtifactDir


class PythonStage(Stage[PythonStageConfig, NamedInputs, PythonOutput]):
    """One Ray task. What the function left in its folder is kept between attempts."""

    code_version = 1
    progress = ProgressMetrics(PROGRESS_TOTAL, {})

    def content_identity(self, config: PythonStageConfig) -> dict[str, str]:
        """Digests of the modules. Raises UserError: one of them, or the function, is missing or invalid."""
        return find_sources(config).digests

    def code_files(self, config: PythonStageConfig) -> list[Path]:
        """The modules."""
        return [file.path for file in find_sources(config).files]

    def run(self, config: PythonStageConfig, inputs: NamedInputs, context: StageContext) -> PythonOutput:
        """Ship the source, and call the function. Raises as pipelines.stages.python.task."""
        from pipelines.tracking.remote import remote_journal

        artifact = context.artifact
        sources = find_sources(config)
        require_planned_content(context, sources.digests)
        sources.write(artifact.local / SOURCE_FOLDER)
        artifact.publish(SOURCE_FOLDER)
        single, several = _inputs(inputs.by_name)
        call = Call(
            stage=context.name,
            call=config.call,
            args=config.args,
            inputs=single,
            gathered=several,
            modules={file.module: str(file.path) for file in sources.files},
            artifact=artifact,
        )
        with remote_journal(context.journal) as journal:
            (output,) = run_tasks(call_function, [(call, journal)], config.resources)
        context.journal.log_artifact(LOG_FILE)
        return output

    def headline(self, config: PythonStageConfig, output: PythonOutput, artifact: ArtifactDir) -> str | None:
        """What the function returned."""
        summary = output.summary()
        return escape(summary) if summary else None


def _inputs(
    by_name: Mapping[str, AnyNode | tuple[AnyNode, ...]],
) -> tuple[dict[str, Input], dict[str, tuple[Input, ...]]]:
    """Single stages, and lists of stages, by name."""
    single = {name: _input(read) for name, read in by_name.items() if not isinstance(read, tuple)}
    several = {name: tuple(map(_input, read)) for name, read in by_name.items() if isinstance(read, tuple)}
    return single, several


def _input(node: AnyNode) -> Input:
    return Input(node.name, node.stage.kind, node.config, node.output, node.fingerprint, node.artifact)

"""An evaluated model on the page of a report: what the measures found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.stages.sections import Section

if TYPE_CHECKING:
    from pipelines.engine.stage import StageNode
    from pipelines.stages.evaluate.stage import EvaluateStage


def evaluated_section(node: StageNode[EvaluateStage]) -> Section:
    """The share of a finished evaluation. A checkpoint on the way is another model than the final one.

    It is of the train stage by the name that this run has for it. The run that it is reused from may have another.
    """
    trained, output = node.inputs.trained, node.output
    subject = output.evaluated.model if trained is None else trained.name
    if trained is not None and output.evaluated.step not in (None, trained.output.steps):
        subject = f"{subject} step {output.evaluated.step}"
    return Section(
        subject=subject,
        source=node.name,
        facts={"evaluated in": output.precision},
        results=output.results,
        artifact=node.artifact,
    )

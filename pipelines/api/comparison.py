"""Finished evaluations of any runs on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from base.errors import UserError
from base.names import suggest
from pipelines.api.finished import finished_stages
from pipelines.engine.graph import nodes_by_role
from pipelines.engine.runs import Run
from pipelines.engine.stage import AnyNode
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.report.identity import run_identity
from pipelines.stages.train.stage import TrainStage

if TYPE_CHECKING:
    from pipelines.stages.report.page import Report


def compare(runs: Sequence[Run], stages: Collection[str] = (), baseline: str = "", title: str = "") -> Report:
    """A page about the finished evaluations of runs, of one storage or of several.

    Args: stages: names of evaluate stages, or of the train stages that they evaluate; empty: all. baseline: the model
        that others are compared with, as the page names it; empty: the first.
    Raises: UserError: a run has no such evaluation, or there is no such baseline.
    """
    from pipelines.stages.report.nodes import RunShare, content_of
    from pipelines.stages.report.page import build_report

    labels = run_labels(runs)
    shares = [
        RunShare(run_identity(run), _evaluations(run, stages), label) for run, label in zip(runs, labels, strict=True)
    ]
    title = title or f"Evaluations of {', '.join(label or run.run_id for run, label in zip(runs, labels, strict=True))}"
    about = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by bmojo compare."
    return build_report(content_of(title, about, shares, baseline))


def run_labels(runs: Sequence[Run]) -> list[str]:
    """What to call each run beside the others: its pipeline's name, id or URL, the shortest that is its own.

    A run that is alone needs none. Raises: UserError: a run is named twice.
    """
    if len(runs) == 1:
        return [""]
    kinds = ([run.info().name for run in runs], [run.run_id for run in runs], [run.url for run in runs])
    counts = [Counter(names) for names in kinds]
    twice = [url for url, count in counts[-1].items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice. Name each run once.")
    return [
        next(name for name, count in zip(names, counts, strict=True) if count[name] == 1)
        for names in zip(*kinds, strict=True)
    ]


def _evaluations(run: Run, stages: Collection[str]) -> list[AnyNode]:
    """The finished evaluations of a run, of these stages."""
    finished = [node for node in finished_stages(run).values() if node.stage.kind == EvaluateStage.kind]
    known = {node.name: node for node in finished}
    names = {name for node in finished for name in (node.name, *_subjects(node))}
    if stages:
        missing = next((name for name in stages if name not in names), None)
        if missing is not None:
            raise UserError(
                f"Run {run.run_id} has no finished evaluation {missing!r}, nor of a stage of that name."
                f"{suggest(missing, sorted(names))}"
            )
        known = {name: node for name, node in known.items() if {name, *_subjects(node)} & set(stages)}
    if not known:
        states = run.state().stages
        of_kind = [f"{name} is {stage.status}" for name, stage in states.items() if stage.kind == EvaluateStage.kind]
        raise UserError(
            f"Run {run.run_id} has no finished evaluation: {', '.join(of_kind) or 'it has no evaluate stage'}."
        )
    return list(known.values())


def _subjects(node: AnyNode) -> list[str]:
    """The stages that trained what is evaluated."""
    read = [one for nodes in nodes_by_role(node).values() for one in nodes]
    return [one.name for one in read if one.stage.kind == TrainStage.kind]

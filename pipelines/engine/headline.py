"""What the run of a whole pipeline shows, so that runs can be put side by side: settings, figures, costs, places."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.engine.fingerprint import flatten
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.placement import ClusterNode, described
from pipelines.engine.plan import PlannedStage
from pipelines.engine.process import submitted_job
from pipelines.engine.provenance import git_commit, machine, user_name
from pipelines.engine.runs import Run
from pipelines.engine.stage import StageOutput
from pipelines.redact import redact


def settings_of(plan: Sequence[PlannedStage]) -> dict[str, Any]:
    """All settings that decide the results, hence the same in every drive of a run: `train.lr`.

    The only stage of its kind goes by its kind, whatever its name, so that pipelines with other names compare.
    """
    return {
        f"{_label(plan, stage)}.{field}": value
        for stage in plan
        for field, value in flatten(stage.fingerprint.parts.config).items()
        if field != "kind"
    }


def figures_of(kinds: Mapping[str, str], name: str, output: StageOutput) -> dict[str, float]:
    """A finished stage's figures: `eval/loss`, or `STAGE/eval/loss` where the run has several stages of the kind.

    Args: kinds: of all stages of the run, by name.
    """
    prefix = "" if list(kinds.values()).count(kinds[name]) == 1 else f"{name}/"
    return {f"{prefix}{figure}": value for figure, value in output.figures().items()}


def costs_of(plan: Sequence[PlannedStage], stage: PlannedStage, duration_s: float, attempts: int) -> dict[str, float]:
    """What a finished stage took, under the label of its settings: `stages/duration_s/train`, `stages/attempts/train`.

    Trackers draw metrics in alphabetical order: those that runs are judged by come first.
    Args: duration_s: of the attempt that finished it. attempts: of this run; 0 if another run made it.
    """
    label = _label(plan, stage)
    return {
        f"stages/duration_s/{label}": duration_s,
        **({f"stages/attempts/{label}": float(attempts)} if attempts else {}),
    }


def run_tags(pipeline: Pipeline, plan: Sequence[PlannedStage], run: Run, is_resumed: bool) -> dict[str, str]:
    """What tells a run from others, as tags."""
    places = _place_tags(run)
    tags = {
        "bmojo.pipeline": pipeline.name,
        "mlflow.source.name": pipeline.config_path or pipeline.name,
        **places,
        **_change_tags(plan),
        **_identity_tags(pipeline.overrides),
    }
    if not is_resumed:  # later it may be the user's own text
        tags["mlflow.note.content"] = _description(places)
    return tags


def _change_tags(plan: Sequence[PlannedStage]) -> dict[str, str]:
    """What differs from the last runs of these stages: a tag for each that differs, so that a resume keeps them."""
    return {f"bmojo.changed.{stage.name}": "; ".join(stage.changes) for stage in plan if stage.changes}


def _place_tags(run: Run) -> dict[str, str]:
    """Where the run is: its folder and, in a submitted job, the job and its page ($BMOJO_DASHBOARD)."""
    job, dashboard = submitted_job(), os.environ.get("BMOJO_DASHBOARD")
    tags = {"bmojo.storage": run.storage.url, "bmojo.run_dir": run.url, "bmojo.ray_job": job or "none"}
    if job and dashboard:
        tags["bmojo.ray_job_url"] = f"{dashboard.rstrip('/')}/#/jobs/{job}"
    return tags


def _description(places: Mapping[str, str]) -> str:
    """The description of a new run in MLflow, in Markdown: its links, which no column of a table can have."""
    url = places.get("bmojo.ray_job_url")
    job = f"[{places['bmojo.ray_job']}]({url})" if url else places["bmojo.ray_job"]
    run_dir = places["bmojo.run_dir"]
    folder = f"[{run_dir}]({run_dir})" if run_dir.startswith(("https://", "http://")) else f"`{run_dir}`"
    return f"Run folder: {folder}\n\nRay job: {job}"


def hardware_of(nodes: Sequence[ClusterNode]) -> str:
    """The machines of a cluster, as `2 x (8 CPU, 1 GPU)`."""
    machines = Counter(described([node]) for node in nodes)
    return ", ".join(f"{count} x ({machine})" for machine, count in machines.items())


def _identity_tags(overrides: Sequence[str] | None) -> dict[str, str]:
    """User, machine, code version and overrides (None: not known) of a run, as tags."""
    commit = git_commit() or "unknown"
    tags = {
        "mlflow.user": user_name(),
        "mlflow.source.git.commit": commit.removesuffix("-dirty"),
        "bmojo.git_commit": commit,
        **{f"bmojo.driver.{part}": found for part, found in machine().items()},
    }
    if overrides is not None:
        tags["bmojo.overrides"] = shlex.join(masked_overrides(overrides)) or "none"
    return tags


def masked_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides with secrets masked; of those of the same field the last."""
    values = redact({name: value for name, _, value in (text.partition("=") for text in overrides)})
    return [f"{name}={value}" for name, value in values.items()]


def _label(plan: Sequence[PlannedStage], stage: PlannedStage) -> str:
    return stage.kind if _is_alone(plan, stage) and all(stage.kind != other.name for other in plan) else stage.name


def _is_alone(plan: Sequence[PlannedStage], stage: PlannedStage) -> bool:
    return sum(other.kind == stage.kind for other in plan) == 1

"""Settings and final figures that the run of a whole pipeline shows, so that runs can be put side by side."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.engine.fingerprint import flatten
from pipelines.engine.plan import PlannedStage
from pipelines.engine.provenance import git_commit, machine, user_name
from pipelines.engine.stage import StageOutput
from pipelines.redact import redact


def settings_of(plan: Sequence[PlannedStage]) -> dict[str, Any]:
    """All settings that decide the results, hence the same in every drive of a run: `train.lr`.

    The only stage of its kind goes by its kind, whatever its name, so that pipelines with other names compare.
    """
    names = {stage.name for stage in plan}
    labels = {
        stage.name: stage.kind if _is_alone(plan, stage) and stage.kind not in names else stage.name for stage in plan
    }
    return {
        f"{labels[stage.name]}.{field}": value
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


def identity_tags(overrides: Sequence[str] | None) -> dict[str, str]:
    """User, machine, code version and overrides (None: not known) of a run, as tags."""
    commit = git_commit() or "unknown"
    tags = {
        "mlflow.user": user_name(),
        "mlflow.source.git.commit": commit.removesuffix("-dirty"),
        "bmojo.git_commit": commit,
        **{f"bmojo.driver.{part}": found for part, found in machine().items()},
    }
    if overrides is not None:
        values = redact({name: value for name, _, value in (text.partition("=") for text in overrides)})
        tags["bmojo.overrides"] = shlex.join(f"{name}={value}" for name, value in values.items()) or "none"
    return tags


def _is_alone(plan: Sequence[PlannedStage], stage: PlannedStage) -> bool:
    return sum(other.kind == stage.kind for other in plan) == 1

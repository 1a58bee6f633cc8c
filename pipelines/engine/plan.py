"""What a run would do, stage by stage, and why. Reads the storage, changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pipelines.engine.fingerprint import Fingerprint, InputIdentity, differences, fingerprint_stage
from pipelines.engine.graph import topological_order
from pipelines.engine.records import Artifacts, FinishedStage
from pipelines.engine.stage import Stage, StageConfig
from pipelines.errors import ConfigError, UserError
from pipelines.storage import Storage
from pipelines.storage.artifact import ArtifactDir


class Action(StrEnum):
    """What will happen to a stage."""

    REUSE = "reuse"  # its record is there
    RUN = "run"
    RESUME = "resume"  # an earlier attempt left something to carry on from


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan. `changes` says what differs from the last finished stage of that kind and name."""

    name: str
    kind: str
    action: Action
    reason: str
    changes: tuple[str, ...]
    config: StageConfig
    fingerprint: Fingerprint
    artifact: ArtifactDir
    finished: FinishedStage | None


def plan(stages: Mapping[str, StageConfig], kinds: Mapping[str, Stage], storage: Storage) -> list[PlannedStage]:
    """Plan the stages in the order in which they would run.

    Raises: ConfigError: the graph is not sound, a kind is unknown, or a raw input is missing. UserError: a record is
    damaged.
    """
    artifacts = Artifacts(storage)
    order = topological_order({name: config.needs for name, config in stages.items()})
    planned: dict[str, PlannedStage] = {}
    for name in order:
        config = stages[name]
        stage = stage_of_kind(config.kind, kinds, name)
        inputs = [
            InputIdentity(name=needed, kind=planned[needed].kind, fingerprint=planned[needed].fingerprint.digest)
            for needed in config.needs
        ]
        fingerprint = fingerprint_stage(stage, config, inputs, _content(stage, config, name))
        planned[name] = _plan_one(name, config, fingerprint, artifacts)
    return list(planned.values())


def stage_of_kind(kind: str, kinds: Mapping[str, Stage], name: str) -> Stage:
    """The implementation of a kind. Raises ConfigError where there is none."""
    if kind not in kinds:
        raise ConfigError(f"stages.{name}.kind: there is no kind {kind!r}. The kinds: {', '.join(sorted(kinds))}.")
    return kinds[kind]


def _content(stage: Stage, config: StageConfig, name: str) -> str | None:
    try:
        return stage.content_identity(config)
    except FileNotFoundError as error:
        raise ConfigError(f"stages.{name}: {error}. Correct the path, or put the file there.") from error
    except UserError as error:
        raise ConfigError(f"stages.{name}: {error}") from error


def _plan_one(name: str, config: StageConfig, fingerprint: Fingerprint, artifacts: Artifacts) -> PlannedStage:
    kind = config.kind
    finished = artifacts.find(kind, name, fingerprint)
    artifact = finished.artifact if finished else artifacts.directory(kind, name, fingerprint)
    changes: tuple[str, ...] = ()
    if finished is not None:
        action, reason = Action.REUSE, f"finished {finished.record.created_at}"
        if finished.record.name != name:
            reason += f" as {finished.record.name}"
    elif artifacts.is_started(kind, name, fingerprint):
        action, reason = Action.RESUME, "an earlier attempt was interrupted; it carries on from there"
    else:
        action = Action.RUN
        latest = artifacts.latest(kind, name)
        changes = tuple(differences(latest.parts, fingerprint.parts)) if latest else ()
        reason = f"changed since {latest.created_at}" if latest else "not run yet"
    return PlannedStage(name, kind, action, reason, changes, config, fingerprint, artifact, finished)

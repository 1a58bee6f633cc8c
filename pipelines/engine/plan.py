"""Plan of a run, stage by stage, with reasons. Reads the storage, changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from base.errors import UserError
from pipelines.engine.fingerprint import Fingerprint, InputIdentity, differences, fingerprint_stage
from pipelines.engine.graph import Role, nodes_by_role
from pipelines.engine.records import Artifacts
from pipelines.engine.stage import AnyNode, Content, StageConfig
from pipelines.errors import ConfigError
from pipelines.storage import Storage
from pipelines.storage.artifact import ArtifactDir


class Action(StrEnum):
    """Future of a stage."""

    REUSE = "reuse"  # its record is there
    RUN = "run"
    RESUME = "resume"  # an earlier attempt left something to resume from


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan. `changes` says what differs from the last finished stage of that kind and name."""

    node: AnyNode
    action: Action
    reason: str
    changes: tuple[str, ...]
    fingerprint: Fingerprint
    artifact: ArtifactDir

    @property
    def name(self) -> str:
        """Its name in the pipeline."""
        return self.node.name

    @property
    def kind(self) -> str:
        """Its kind."""
        return self.node.stage.kind

    @property
    def config(self) -> StageConfig:
        """Its settings."""
        return self.node.config


def plan(graph: Sequence[AnyNode], storage: Storage) -> list[PlannedStage]:
    """Plan the stages in the order in which they would run.

    Raises: ConfigError: a raw input is missing. UserError: a record is damaged.
    """
    artifacts = Artifacts(storage)
    planned: dict[str, PlannedStage] = {}
    for node in graph:
        fingerprint = fingerprint_stage(node.stage, node.config, _identities(node, planned), _content(node))
        planned[node.name] = _plan_one(node, fingerprint, artifacts)
    return list(planned.values())


def _identities(node: AnyNode, planned: Mapping[str, PlannedStage]) -> dict[str, list[InputIdentity]]:
    """Inputs of a stage by kind; by kind and role, if several roles read one kind; by name, if any kind will do."""
    by_role = nodes_by_role(node)
    kinds = [role.kind for role in by_role]

    def key(role: Role) -> str:
        if role.kind is None:
            return f"named {role.name}"
        return role.kind if kinds.count(role.kind) == 1 else f"{role.kind} {role.name}"

    return {
        key(role): [
            InputIdentity(
                name=read.name,
                kind=read.stage.kind,
                fingerprint=planned[read.name].fingerprint.digest,
                named=role.name if role.kind is None else None,
            )
            for read in nodes
        ]
        for role, nodes in by_role.items()
        if nodes
    }


def _content(node: AnyNode) -> Content | None:
    try:
        return node.stage.content_identity(node.config)
    except FileNotFoundError as error:
        raise ConfigError(f"stages.{node.name}: {error}. Correct the path, or put the file there.") from error
    except UserError as error:
        raise ConfigError(f"stages.{node.name}: {error}") from error


def _plan_one(node: AnyNode, fingerprint: Fingerprint, artifacts: Artifacts) -> PlannedStage:
    kind, name = node.stage.kind, node.name
    finished = artifacts.find(kind, name, fingerprint)
    artifact = finished.artifact if finished else artifacts.directory(kind, name, fingerprint)
    changes: tuple[str, ...] = ()
    if finished is not None:
        action, reason = Action.REUSE, f"finished {finished.record.created_at}"
        if finished.record.name != name:
            reason += f" as {finished.record.name}"
    elif artifacts.is_started(kind, name, fingerprint):
        action, reason = Action.RESUME, "an earlier attempt was interrupted; it resumes from there"
    else:
        action = Action.RUN
        latest = artifacts.latest(kind, name)
        changes = tuple(differences(latest.parts, fingerprint.parts)) if latest else ()
        reason = f"changed since {latest.created_at}" if latest else "not run yet"
    return PlannedStage(node, action, reason, changes, fingerprint, artifact)

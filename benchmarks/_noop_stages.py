"""Stages that do nothing, and a cluster that is not there, to see what the engine itself costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipelines.engine.graph import stage_graph
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.placement import ClusterNode
from pipelines.engine.stage import Stage, StageConfig, StageContext, StageInputs, StageNode, StageOutput
from pipelines.storage import Storage


class NoopConfig(StageConfig):
    """Settings of a stage that does nothing."""

    kind: Literal["noop"] = "noop"
    number: int = 0


@dataclass(frozen=True)
class NoopInputs(StageInputs):
    """The stages before it."""

    before: tuple[StageNode[NoopStage], ...] = ()


class NoopStage(Stage[NoopConfig, NoopInputs, StageOutput]):
    """Does nothing."""

    code_version = 1
    uses_cluster = False

    def run(self, config: NoopConfig, inputs: NoopInputs, context: StageContext) -> StageOutput:
        """Return at once."""
        return StageOutput()


class NoCluster:
    """No stage asks for it."""

    environment: dict[str, str]

    def __init__(self) -> None:
        self.environment = {}

    def prepare(self) -> None:
        """Nothing."""

    def start(self) -> Callable[[], None]:
        """Never called."""
        raise NotImplementedError

    def nodes(self) -> list[ClusterNode]:
        """None are known."""
        return []

    def is_lost(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing."""


def noop_pipeline(storage: Storage, num_stages: int, in_a_row: bool) -> Pipeline:
    """So many stages, each after the one before, or all at once."""
    configs: dict[str, StageConfig] = {}
    for number in range(num_stages):
        needs = (f"s{number - 1}",) if in_a_row and number else ()
        configs[f"s{number}"] = NoopConfig(number=number, needs=needs)
    return Pipeline("noop", stage_graph(configs, (NoopStage(),)), storage)

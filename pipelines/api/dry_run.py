"""Two steps of each training of a pipeline on its real workers, beside what was planned of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from pipelines.config import PipelineConfig
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.records import Artifacts
from pipelines.engine.stage import Machines, StageNode
from pipelines.ray_cluster import RayCluster
from pipelines.session import open_pipeline
from pipelines.stages.train.data import TokenSource
from pipelines.stages.train.planning.calibration import process_memory
from pipelines.stages.train.planning.estimate import TrainPlan, plan_training
from pipelines.stages.train.planning.fitting import room_of
from pipelines.stages.train.planning.speed import remember
from pipelines.stages.train.planning.steps import Steps
from pipelines.stages.train.planning.words import size
from pipelines.stages.train.stage import TrainStage
from pipelines.tracking.environment import quiet_environment


@dataclass(frozen=True)
class DryReport:
    """One train stage."""

    plan: TrainPlan
    steps: Steps

    def row(self) -> dict[str, str]:
        """For a table."""
        plan, steps = self.plan, self.steps
        room = room_of(plan.train, None)
        verdict = "not known" if room is None else ("yes" if steps.peak_bytes <= room else "no")
        tokens_per_s = plan.train.global_batch_size * plan.seq_len / steps.step_s
        return {
            "train stage": plan.name,
            "workers": str(steps.num_workers),
            "on": steps.tokens,
            "step": f"{steps.step_s:.3g} s",
            "planned step": f"{plan.speed.step_s:.3g} s",
            "tokens/s": f"{tokens_per_s:,.0f}",
            "peak memory a worker": size(steps.peak_bytes),
            "planned": size(plan.memory.peak),
            "fits": f"{verdict}, of {size(room)}" if room is not None else verdict,
        }


def dry_run(config: PipelineConfig, machines: Machines) -> Iterator[DryReport]:
    """Take steps of each train stage, one after the other, in the cluster of the pipeline. Writes nothing there.

    Tokens are those of finished tokenize stages, else random ids of the planned vocabulary. What steps take is kept for
    plans.

    Raises: UserError: the settings, or what they ask for, are at fault. InfrastructureError: the cluster is.
    """
    quiet_environment()
    pipeline = open_pipeline(config)
    nodes = [cast(StageNode[TrainStage], node) for node in pipeline.graph if isinstance(node.stage, TrainStage)]
    if not nodes:
        return
    planned = {one.name: one for one in pipeline.plan()}
    processes = {node.name: process_memory(node.config.activation_checkpointing) for node in nodes}  # before it is busy
    cluster = RayCluster(config.cluster, config.stages.values(), pipeline.storage.url)
    os.environ.update(cluster.environment)  # which Ray reads when it is imported
    import ray

    from pipelines.stages.train.planning.dry import take_dry_steps

    try:
        cluster.start()()
        for node in nodes:
            plan = plan_training(node, machines, processes[node.name])
            steps = take_dry_steps(plan.train, plan.seq_len, _sources(node, planned, Artifacts(pipeline.storage)))
            remember(plan.train, plan.seq_len, steps, "run --dry")
            yield DryReport(plan, steps)
    finally:
        ray.shutdown()
        cluster.close()


def _sources(
    node: StageNode[TrainStage], planned: Mapping[str, PlannedStage], artifacts: Artifacts
) -> list[TokenSource]:
    """The tokens of a train stage; none if one of its tokenize stages has not finished."""
    sources = []
    for tokens in node.inputs.tokens:
        stage = planned[tokens.name]
        found = artifacts.find(stage.kind, stage.name, stage.fingerprint) if stage.action is Action.REUSE else None
        if found is None:
            return []
        result = found.result(tokens.stage)
        output = result.output
        sources.append(
            TokenSource(tokens.name, result.artifact, output.num_train_samples, output.num_valid_samples > 0)
        )
    return sources

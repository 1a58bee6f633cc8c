"""A validated pipeline file made ready to be planned and run: storage, kinds, tracking, cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.cluster import check_address
from pipelines.config import PipelineConfig
from pipelines.engine.lease import configured_ttl_s, renewal_s
from pipelines.engine.observer import Observer
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Run
from pipelines.engine.scheduler import run_pipeline
from pipelines.preflight import check_pipeline
from pipelines.ray_cluster import RayCluster
from pipelines.storage import open_storage
from pipelines.tracking.config import targets_of, trackers_of
from pipelines.tracking.environment import quiet_environment
from pipelines.tracking.run_tracking import TrackingOptions


def open_pipeline(
    config: PipelineConfig,
    config_path: str | Path | None = None,
    overrides: Sequence[str] | None = None,
    is_for_here: bool = True,
) -> Pipeline:
    """The pipeline that the engine drives. Args: is_for_here: False: it is planned for other machines.

    Raises: ConfigError, UserError: it asks for what cannot be had here.
    """
    graph = config.graph()
    if is_for_here:
        check_pipeline(config.cluster, graph)
    check_address(config.cluster, graph)
    return Pipeline(
        name=config.name,
        graph=graph,
        storage=open_storage(config.storage),
        config=config.model_dump(mode="json"),
        config_path=str(config_path) if config_path else None,
        overrides=overrides,
    )


def run_config(
    config: PipelineConfig,
    config_path: str | Path | None = None,
    observer: Observer | None = None,
    expected: Run | None = None,
    overrides: Sequence[str] | None = None,
) -> RunResult:
    """Run or resume the pipeline, scheduled by this process. Errors of stages are in the result; see run_pipeline.

    MLflow's and Ray's settings that this process's environment does not name get defaults (tracking/environment.py).

    Args: overrides: what the config was loaded with, to be shown with the run; None: not known.
    """
    quiet_environment()
    pipeline = open_pipeline(config, config_path, overrides)
    tracking = TrackingOptions(
        targets_of(config.tracking, pipeline.storage),
        system_metrics=any(tracker.system_metrics for tracker in trackers_of(config.tracking)),
    )
    ttl_s = configured_ttl_s()
    return run_pipeline(
        pipeline,
        tracking,
        RayCluster(config.cluster, config.stages.values(), pipeline.storage.url),
        observer=observer,
        lease_ttl_s=ttl_s,
        lease_renew_s=renewal_s(ttl_s),
        expected=expected,
    )

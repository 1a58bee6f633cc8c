"""A validated pipeline file made ready to be planned and run: storage, kinds, tracking, cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipelines.cluster import check_address, ensure_cluster
from pipelines.config import PipelineConfig
from pipelines.engine.observer import Observer
from pipelines.engine.runner import Pipeline, RunResult, run_pipeline
from pipelines.engine.runs import Run
from pipelines.preflight import check_pipeline
from pipelines.storage import open_storage
from pipelines.tracking.run_tracking import TrackingOptions
from pipelines.tracking.target import resolve_target


def open_pipeline(
    config: PipelineConfig, config_path: str | Path | None = None, overrides: Sequence[str] | None = None
) -> Pipeline:
    """The pipeline that the engine drives. Raises ConfigError, UserError: it asks for what cannot be had here."""
    graph = config.graph()
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


def run(
    config: PipelineConfig,
    config_path: str | Path | None = None,
    observer: Observer | None = None,
    expected: Run | None = None,
    overrides: Sequence[str] | None = None,
) -> RunResult:
    """Run or resume the pipeline, in this process. Errors of stages are in the result; see run_pipeline.

    Args: overrides: what the config was loaded with, to be shown with the run; None: not known.
    """
    pipeline = open_pipeline(config, config_path, overrides)
    target = resolve_target(config.tracking.uri, config.tracking.experiment, pipeline.storage)
    return run_pipeline(
        pipeline,
        TrackingOptions(target, system_metrics=config.tracking.system_metrics),
        ensure_cluster=partial(ensure_cluster, config.cluster, config.stages.values()),
        observer=observer,
        expected=expected,
    )

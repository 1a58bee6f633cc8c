"""What of Ray Train is used on the driver's side."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pipelines.stages.train import launch


@pytest.mark.parametrize("dashboard", [None, "127.0.0.1:8265"])
def test_the_cleaner_of_placement_groups_runs_only_if_there_is_a_dashboard_that_it_can_ask(
    dashboard: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "get_dashboard_url", lambda: dashboard)
    trainer = launch._Trainer(
        print, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(tmp_path))
    )
    cleaners = [
        callback
        for callback in trainer._create_default_callbacks()
        if isinstance(callback, PlacementGroupCleanerCallback)
    ]
    assert len(cleaners) == (dashboard is not None)

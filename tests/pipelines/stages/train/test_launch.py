"""What of Ray Train is used on the driver's side."""

from __future__ import annotations

from pathlib import Path

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pipelines.stages.train import launch


def test_of_ray_trains_own_callbacks_only_the_cleaner_of_placement_groups_is_left_out(tmp_path: Path) -> None:
    def callbacks_of(kind: type[TorchTrainer]) -> list[type]:
        trainer = kind(
            print, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(tmp_path))
        )
        return [type(callback) for callback in trainer._create_default_callbacks()]

    usual = callbacks_of(TorchTrainer)
    assert PlacementGroupCleanerCallback in usual
    assert callbacks_of(launch._Trainer) == [kind for kind in usual if kind is not PlacementGroupCleanerCallback]

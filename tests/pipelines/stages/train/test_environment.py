"""The environment variables of training."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.engine.stage import Resources
from pipelines.stages.train import environment
from pipelines.stages.train.config import TrainStageConfig

TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def test_ray_trains_settings_end_with_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "1")
    monkeypatch.delenv(TIMEOUT, raising=False)
    before = dict(os.environ)
    with environment.ray_train_settings(Resources(placement_timeout_s=7)):
        assert os.environ[TIMEOUT] == "7.0"
        assert os.environ["RAY_TRAIN_METRICS_ENABLED"] == "0"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"cpus_per_worker": 2.5}, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}),
        ({"gpus_per_worker": 1}, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    ],
)
def test_a_worker_sets_what_its_device_and_its_backend_need(
    resources: dict[str, float],
    expected: dict[str, str],
    train_config: Callable[..., TrainStageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(environment.os, "environ", found)
    environment.set_worker_environment(train_config(resources=resources))
    assert found == expected


def test_no_other_module_of_training_edits_the_environment() -> None:
    folder = Path(environment.__file__).parent
    editing = re.compile(r"os\.environ|putenv")
    assert {file.name for file in folder.rglob("*.py") if editing.search(file.read_text())} == {"environment.py"}

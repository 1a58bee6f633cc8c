"""The estimate of a training's time depends on the machine, not on the moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipelines.loading import load_pipeline
from pipelines.stages.train import estimates
from tests.pipelines.test_loading import PIPELINE


@pytest.mark.parametrize("content", [None, "", "nonsense", "[]", "NaN", "1e30", "-1"])
def test_the_best_peak_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = estimates.core_peak()
    (file,) = (tmp_path / "bmojo").iterdir()
    assert torch.__version__.split("+")[0] in file.name
    assert json.loads(file.read_text()) == first
    if content is None:
        assert estimates.core_peak() >= first
    else:
        file.write_text(content)
        assert 1e8 < estimates.core_peak() < estimates.MOST_CORE_FLOPS


def test_more_cpus_than_cores_do_not_shorten_the_estimate(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(PIPELINE)

    def time_s(cpus: int) -> float:
        graph = load_pipeline(file, [f"train.resources.cpus_per_worker={cpus}"]).graph()
        (train,) = (node for node in graph if node.name == "train")
        return estimates.estimate_training(train, 1e10, 2).time_s

    assert time_s(1) == time_s(30)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.001, "1 s"), (100, "100 s"), (3600, "60.0 min"), (1e30, "more than 100 years")]
)
def test_durations_have_a_readable_size(seconds: float, text: str) -> None:
    assert estimates.in_words(seconds) == text

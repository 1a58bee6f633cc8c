"""Tags that say which path each operator took."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.operator import Choice
from pipelines.stages.train import paths
from pipelines.stages.train.paths import OperatorPaths
from tests.pipelines.stages.train.training import FileSink


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """What operators took so far, as kernels.operator.ran says it."""
    choices: list[Choice] = []
    monkeypatch.setattr(paths, "ran", lambda: list(choices))
    return choices


def test_each_report_brings_what_is_new(tmp_path: Path, taken: list[Choice]) -> None:
    sink = FileSink(tmp_path / "sink.jsonl")
    reports = OperatorPaths(sink)
    taken[:] = [Choice("gated", "cpp", "float32"), Choice("linear", "torch", "oneDNN is for training")]
    reports.report()
    reports.report()
    taken.append(Choice("linear", "cpp", "float32"))
    reports.report()
    assert sink.tags() == [
        {"bmojo.path.gated": "cpp: float32", "bmojo.path.linear": "torch: oneDNN is for training"},
        {"bmojo.path.linear": "torch: oneDNN is for training; cpp: float32"},
    ]


def test_ranks_without_a_journal_say_nothing(taken: list[Choice]) -> None:
    taken.append(Choice("gated", "cpp", "float32"))
    OperatorPaths(None).report()

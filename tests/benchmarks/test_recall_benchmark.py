"""The recall benchmark, with a handful of steps: it resumes, refuses to mix settings, and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import recall

TINY = [
    "--steps",
    "2",
    "--eval-every",
    "1",
    "--num-test",
    "8",
    "--batch-size",
    "4",
    "--seeds",
    "1",
    "--models",
    "swa",
    "bmojo",
]


def run(folder: Path, *more: str) -> None:
    recall.main([*TINY, "--out", str(folder / "runs"), "--report", str(folder / "recall_2026-01-01"), *more])


def test_finished_runs_are_kept_and_reported(tmp_path, monkeypatch):
    run(tmp_path)
    page = (tmp_path / "recall_2026-01-01.md").read_text()
    assert "| swa |" in page
    assert "| bmojo | 2 |" in page  # memory of its second layer
    assert (tmp_path / "recall_2026-01-01.png").read_bytes().startswith(b"\x89PNG")
    records = json.loads((tmp_path / "recall_2026-01-01.json").read_text())
    assert [point["step"] for point in records[0]["curve"]] == [0, 1, 2]
    monkeypatch.setattr(recall, "train", lambda *_: pytest.fail("a finished run was done again"))
    run(tmp_path)


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    run(tmp_path)
    with pytest.raises(SystemExit, match=r"was run with steps=2"):
        run(tmp_path, "--steps", "3")


def test_what_is_kept_is_counted_at_the_time_of_the_query():
    settings = recall.Settings(num_test=16)
    model = recall.BMojoLM(settings.model("bmojo"))
    figures = recall.evaluate(model, recall.as_tensors(recall.recall_batch(settings.task, 16, 0)), settings.num_pairs)
    for layer in figures["layers"]:
        kept = layer["kept"]
        assert sum(layer["mass"]) == pytest.approx(1, abs=1e-3)
        assert 0 < kept["value"] < 1
        # 16 slots over 8 values, 8 keys and the noise that has left the window by then, 24 on average
        assert 8 * kept["value"] + 8 * kept["key"] + 24 * kept["noise"] == pytest.approx(16, rel=0.25)

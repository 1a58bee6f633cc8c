"""`bmojo run --dry`: real steps on real workers, and a storage that stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline, write_pipeline

pytestmark = pytest.mark.slow


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_it_takes_steps_on_the_tokens_that_are_there_and_writes_nothing(
    finished_pipeline: tuple[TinyPipeline, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path))
    pipeline, _ = finished_pipeline
    before = listing(pipeline.storage)
    dry = pipeline.run("--dry", "stages.train.max_steps=17")
    assert dry.code == 0, dry.output
    assert "its tokens" in dry.output
    assert listing(pipeline.storage) == before
    plan = pipeline.bmojo("plan", str(pipeline.file), "stages.train.max_steps=17")
    assert "run --dry" in plan.output, "a plan goes by the steps that were measured"


def test_without_tokens_it_says_that_they_are_random_and_makes_no_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "cache"))
    pipeline = write_pipeline(tmp_path / "new")
    dry = pipeline.run("--dry")
    assert dry.code == 0, dry.output
    assert "random" in dry.output
    assert not [path for path in pipeline.storage.rglob("*") if path.is_file()]

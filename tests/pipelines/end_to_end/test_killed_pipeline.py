"""SIGKILL of the whole process tree at the worst moments, then the same command: nothing done twice, the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline, kill_tree, wait_until, write_pipeline

pytestmark = pytest.mark.slow

# Fields out of the fingerprint may not change the result, so that a slower training can be killed half-way in peace.
EVERY_LOSS = ("final_train_loss", "initial_valid_loss", "final_valid_loss")


def losses(pipeline: TinyPipeline) -> list[float]:
    output = pipeline.record("train")["output"]
    return [output[name] for name in EVERY_LOSS]


def test_killed_in_the_middle_of_tokenize(tmp_path: Path, finished_pipeline: tuple[TinyPipeline, Finished]) -> None:
    unbroken, _ = finished_pipeline
    pipeline = write_pipeline(tmp_path)
    slices = lambda: sorted(pipeline.storage.glob("artifacts/tokenize/*/slices/*.json"))  # noqa: E731
    process = pipeline.start("run", str(pipeline.file))
    wait_until(lambda: len(slices()) >= 5, process)
    kill_tree(process)
    assert not list(pipeline.storage.glob("artifacts/tokenize/*/record.json")), "it was killed too late"
    done_before = {file: file.stat().st_mtime_ns for file in slices()}
    again = pipeline.run()
    assert again.code == 0, again.output
    assert "resuming" in again.output
    assert {file: file.stat().st_mtime_ns for file in done_before} == done_before
    assert pipeline.record("tokenize")["output"] == unbroken.record("tokenize")["output"]
    assert losses(pipeline) == losses(unbroken)


def test_killed_in_the_middle_of_train(tmp_path: Path, finished_pipeline: tuple[TinyPipeline, Finished]) -> None:
    unbroken, _ = finished_pipeline
    pipeline = write_pipeline(tmp_path)
    process = pipeline.start("run", str(pipeline.file))
    wait_until(lambda: len(pipeline.checkpoints()) >= 2, process)
    kill_tree(process)
    assert not list(pipeline.storage.glob("artifacts/train/*/record.json")), "it was killed too late"
    newest = max(int(file.parent.name.removeprefix("step-")) for file in pipeline.checkpoints())
    again = pipeline.run()
    assert again.code == 0, again.output
    assert pipeline.points("train/resumed_from_step", "train") == [(newest, newest)]
    assert pipeline.points("train/loss", "train") == unbroken.points("train/loss", "train")
    assert losses(pipeline) == losses(unbroken)


def test_only_the_driver_is_killed_and_the_run_goes_on_at_once(
    tmp_path: Path, finished_pipeline: tuple[TinyPipeline, Finished]
) -> None:
    """Ray's processes see that their driver is gone, and a dead process's lease holds nobody up."""
    unbroken, _ = finished_pipeline
    pipeline = write_pipeline(tmp_path)
    process = pipeline.start("run", str(pipeline.file))
    wait_until(lambda: bool(list(pipeline.storage.glob("runs/*/journal/train.*.workers.jsonl"))), process)
    process.kill()
    process.communicate()
    status = pipeline.bmojo("status", "--storage", str(pipeline.storage))
    assert "RESUMABLE" in status.output
    again = pipeline.run()
    assert again.code == 0, again.output
    assert losses(pipeline) == losses(unbroken)


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path)
    process = pipeline.start("run", str(pipeline.file))
    try:
        wait_until(lambda: bool(list(pipeline.storage.glob("runs/*/lease/*.json"))), process)
        second = pipeline.run()
        assert second.code == 1
        assert str(process.pid) in second.output
    finally:
        kill_tree(process)

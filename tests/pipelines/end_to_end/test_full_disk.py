"""A disk that is full for training: said as such, and the same command goes on after making room."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline, write_pipeline

pytestmark = pytest.mark.slow

Resize = Callable[[str], None]


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Resize]:
    """A file system of its own in `folder`, and a function that changes its size; skipped where none is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def used_kib(folder: Path) -> int:
    answer = subprocess.run(["df", "-k", "--output=used", str(folder)], capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[-1])


def assert_says_that_the_disk_is_full(ended: Finished, folder: Path, stage: str | None) -> None:
    assert ended.code == 75, ended.output
    assert "error:" in ended.output
    messages = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert len(messages) == 1 or stage is None, "only where the scheduler's log has no room either it says so too"
    for message in messages:
        assert stage is None or f"stage {stage}:" in message
        assert str(folder) in message
        assert "no space" in message.lower()
        assert "Make room" in message
    assert "lost a worker" not in ended.output, "a full disk stays full: it is not tried again at once"
    assert "Traceback" not in ended.output


def assert_same_training(pipeline: TinyPipeline, unbroken: TinyPipeline) -> None:
    for name in ("final_train_loss", "initial_valid_loss", "final_valid_loss"):
        assert pipeline.record("train")["output"][name] == unbroken.record("train")["output"][name]
    assert pipeline.points("train/loss", "train") == unbroken.points("train/loss", "train")


def test_workers_whose_disk_is_full_say_so_and_go_on_after_making_room(
    tmp_path: Path, finished_pipeline: tuple[TinyPipeline, Finished]
) -> None:
    unbroken, _ = finished_pipeline
    pipeline = write_pipeline(tmp_path)
    shards, trained = pipeline.storage / "artifacts/tokenize", pipeline.storage / "artifacts/train"
    with disk(shards, "60k") as resize_shards, disk(trained, "200k") as resize_trained:  # less than one checkpoint
        assert_says_that_the_disk_is_full(pipeline.run(), shards, "tokens")
        resize_shards("64m")
        assert_says_that_the_disk_is_full(pipeline.run(), trained, "train")
        resize_trained("64m")
        again = pipeline.run()
        assert again.code == 0, again.output
        assert_same_training(pipeline, unbroken)


def test_a_whole_storage_that_is_full_keeps_the_state_and_goes_on_after_making_room(
    tmp_path: Path, finished_pipeline: tuple[TinyPipeline, Finished]
) -> None:
    """State, leases, journals and MLflow's files have no room either."""
    unbroken, _ = finished_pipeline
    pipeline = write_pipeline(tmp_path)
    whole = pipeline.file.read_text()
    with disk(pipeline.storage, "256m") as resize:
        pipeline.file.write_text(whole.partition("  train:\n")[0])
        first = pipeline.run()
        assert first.code == 0, first.output
        pipeline.file.write_text(whole)
        resize(f"{used_kib(pipeline.storage) + 700}k")
        assert_says_that_the_disk_is_full(pipeline.run(), pipeline.storage, None)  # a stage, or the scheduler's log
        status = pipeline.bmojo("status", "--storage", str(pipeline.storage))
        assert "RESUMABLE" in status.output
        resize("256m")
        again = pipeline.run()
        assert again.code == 0, again.output
        assert_same_training(pipeline, unbroken)

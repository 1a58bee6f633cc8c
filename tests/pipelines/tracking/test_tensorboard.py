"""TensorBoard as the second sink: what its own reader finds in the files, also after kills."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from pipelines.errors import ConfigError
from pipelines.storage import LocalStorage, open_storage
from pipelines.tracking.journal import Journal
from pipelines.tracking.replay import Replay, deliver_all
from pipelines.tracking.run_tracking import check_target, sync
from pipelines.tracking.sink import Target
from pipelines.tracking.tensorboard import TensorboardConfig, TensorboardTarget
from tests.pipelines.tracking.file_sink import FileTarget, write

pytest.importorskip("tensorboard")


@pytest.fixture
def board(tmp_path: Path) -> TensorboardTarget:
    return TensorboardConfig().target(LocalStorage(tmp_path))


def shown(board: TensorboardTarget, run: str, tag: str = "loss") -> list[tuple[int, float]]:
    """The points of a tag in the order in which TensorBoard's reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(board.log_dir / run), size_guidance={"scalars": 0})
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)] if tag in found.Tags()["scalars"] else []


def points(steps: range) -> list[tuple[int, float]]:
    return [(step, float(step)) for step in steps]


def test_points_and_configurations_are_shown_by_run_and_stage(tmp_path: Path, board: TensorboardTarget) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "run", range(5))
    with Journal(tmp_path / "run/journal/+run.jsonl") as journal:
        journal.log_json("config.json", {"name": "ü"})
        journal.log_table("results.json", ["model", "loss"], [["a", 3.0], ["b", None]])
        journal.write("metrics", step=0, values={"valid/loss": 0.5, "odd": float("nan")})
        journal.log_params({"lr": 0.1})
    replay = Replay(tmp_path / "run/journal", board, "r-1")
    assert deliver_all(replay).remaining == 0
    assert replay.refused == []
    assert shown(board, "r-1/train") == points(range(5))
    assert shown(board, "r-1", "valid/loss") == [(0, 0.5)]
    found = EventAccumulator(str(board.log_dir / "r-1")).Reload()
    now_s = (tmp_path / "run/journal").stat().st_mtime
    assert found.Scalars("valid/loss")[0].wall_time == pytest.approx(now_s, abs=600)
    (text,) = found.Tensors("config.json/text_summary")
    assert '"name": "\\u00fc"' in text.tensor_proto.string_val[0].decode()
    (table,) = found.Tensors("results.json/text_summary")
    assert table.tensor_proto.string_val[0].decode() == "| model | loss |\n| --- | --- |\n| a | 3.0 |\n| b |  |"


def test_delivered_again_from_the_start_nothing_is_doubled(tmp_path: Path, board: TensorboardTarget) -> None:
    write(tmp_path / "run", range(5))
    for steps in (range(5, 8), range(8, 9)):
        deliver_all(Replay(tmp_path / "run/journal", board, "r-1"))
        (tmp_path / "run" / f"delivered-{board.key}.json").unlink()
        write(tmp_path / "run", steps)
    assert deliver_all(Replay(tmp_path / "run/journal", board, "r-1")).remaining == 0
    assert shown(board, "r-1/train") == points(range(9))


def test_a_sync_beside_a_live_run_doubles_nothing(tmp_path: Path, board: TensorboardTarget) -> None:
    live, beside = (Replay(tmp_path / "run/journal", board, "r-1") for _ in range(2))
    for number in range(0, 40, 10):
        write(tmp_path / "run", range(number, number + 10))
        for replay in (live, beside) if number % 20 else (beside, live):
            deliver_all(replay)
    assert sorted(shown(board, "r-1/train")) == points(range(40))


def test_a_figure_made_again_is_another_point_at_its_step(tmp_path: Path, board: TensorboardTarget) -> None:
    for value in (1.0, 2.0):
        with Journal(tmp_path / "run/journal/+run.jsonl") as journal:
            journal.write("metrics", step=0, values={"speed": value})
        deliver_all(Replay(tmp_path / "run/journal", board, "r-1"))
        (tmp_path / "run" / f"delivered-{board.key}.json").unlink()
    deliver_all(Replay(tmp_path / "run/journal", board, "r-1"))
    assert shown(board, "r-1", "speed") == [(0, 1.0), (0, 2.0)]


def test_a_deleted_folder_is_written_again_also_beside_a_live_run(tmp_path: Path, board: TensorboardTarget) -> None:
    write(tmp_path / "run", range(5))
    replay = Replay(tmp_path / "run/journal", board, "r-1")
    deliver_all(replay)
    shutil.rmtree(board.log_dir / "r-1/train")
    write(tmp_path / "run", range(5, 7))
    assert deliver_all(replay).remaining == 0
    assert shown(board, "r-1/train") == points(range(7))


def die_at(change: int, torn: bool) -> None:
    """End this process, as SIGKILL does, at the nth write of an event file or cursor; a torn write is half done."""
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    changes = 0
    append, replace = LocalFileSystem.append, os.replace

    def is_last() -> bool:
        nonlocal changes
        changes += 1
        return changes == change

    def dying_append(self: object, filename: str, content: bytes, binary_mode: bool = False) -> None:
        if is_last():
            if torn:
                append(self, filename, content[: len(content) // 2], binary_mode)
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, filename, content, binary_mode)

    def dying_replace(source: str, destination: str) -> None:
        if is_last():
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)

    LocalFileSystem.append, os.replace = dying_append, dying_replace


@pytest.mark.ci
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_write_each_of_two_sinks_holds_each_point_once(
    tmp_path: Path, board: TensorboardTarget, torn: bool
) -> None:
    import torch.utils.tensorboard  # noqa: F401 (before the forks, so that it is imported once)

    for change in range(1, 100):
        run_dir, files = tmp_path / f"run-{change}", FileTarget(tmp_path / f"files-{change}")
        files.folder.mkdir()
        write(run_dir, range(3))
        run = run_dir / "journal", (board, files), f"r-{change}"
        code = deliver_in_child(*run, die=change, torn=torn)
        write(run_dir, range(2, 5))  # as a resumed run does
        assert deliver_in_child(*run) == 0
        assert shown(board, f"r-{change}/train") == points(range(5))
        assert files.steps() == list(range(5))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert change > 8


def deliver_in_child(
    journals: Path, targets: tuple[Target, ...], run_id: str, die: int | None = None, torn: bool = False
) -> int:
    """Deliver in another process, which dies at write number `die`. Returns its exit code, 0 if all is delivered."""
    child = os.fork()
    if child == 0:
        if die is not None:
            die_at(die, torn)
        os._exit(sum(deliver_all(Replay(journals, target, run_id)).remaining for target in targets))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_missing_package_is_refused_with_what_to_install(
    board: TensorboardTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tracking.run_tracking.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"package tensorboard is not installed.*pip install tensorboard"):
        check_target(board, "r-1")


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = TensorboardConfig(log_dir=str(tmp_path / "file")).target(LocalStorage(tmp_path))
    with pytest.raises(ConfigError, match=r"Not a directory.*choose another place"):
        check_target(target, "r-1")


def test_the_folder_is_under_the_storage_or_where_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    board = TensorboardConfig().target(LocalStorage("runs"))
    assert (board.log_dir, board.viewer()) == (tmp_path / "runs/tensorboard", None)
    assert TensorboardConfig().target(open_storage("memory://x")).log_dir == tmp_path / ".bmojo/tensorboard"
    assert TensorboardConfig(log_dir="logs here").log_dir == str(tmp_path / "logs here")
    with pytest.raises(ValueError, match="expected a folder of this machine"):
        TensorboardConfig(log_dir="s3://bucket/logs")
    write(tmp_path / "runs/runs/r-1", range(3))
    assert sync(LocalStorage("runs"), "runs/r-1", "r-1", board).remaining == 0
    assert board.viewer() == f"tensorboard --logdir {tmp_path}/runs/tensorboard"

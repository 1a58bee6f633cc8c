from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.tracking.journal import DAMAGED, Journal, encode_line, read_events

WRITE = """
import sys
from pipelines.tracking.journal import Journal
journal = Journal(sys.argv[1])
for step in range(int(sys.argv[2]), 10**9):
    journal.log_metrics(step, {"loss": step, "text": 1.0})
    if step == int(sys.argv[2]) + 50:
        print("going", flush=True)
"""


def points(path: Path) -> list[tuple[int, str, float]]:
    return [
        (event["step"], name, value)
        for event, _ in read_events(path)
        if event["event"] == "metrics"
        for name, value in event["values"].items()
    ]


def test_a_resumed_stage_repeats_no_points(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with Journal(path) as journal:
        for step in range(5):
            journal.log_metrics(step, {"train/loss": 1.0 / (step + 1)})
        journal.log_metrics(4, {"valid/loss": 2.0})
    with Journal(path) as journal:
        for step in range(3, 7):
            journal.log_metrics(step, {"train/loss": 1.0 / (step + 1), "valid/loss": 3.0})
        assert journal.last_step("train/loss") == 6
        assert journal.last_step("other") is None
    assert [step for step, name, _ in points(path) if name == "train/loss"] == list(range(7))
    assert [step for step, name, _ in points(path) if name == "valid/loss"] == [4, 3, 5, 6]  # 3 was not told before


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), steps=st.integers(1, 6))
def test_cut_anywhere_the_journal_goes_on_with_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int, steps: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    with Journal(path) as journal:
        for step in range(steps):
            journal.log_metrics(step, {"loss": step})
    data = path.read_bytes()
    path.write_bytes(data[: min(cut, len(data))])
    whole = data[: min(cut, len(data))].count(b"\n")
    assert len(points(path)) == whole
    with Journal(path) as journal:
        for step in range(steps):
            journal.log_metrics(step, {"loss": step})
    assert [step for step, _, _ in points(path)] == list(range(steps))


def test_a_writer_killed_at_full_speed_loses_nothing_before_the_last_line(tmp_path: Path) -> None:
    path, first = tmp_path / "j.jsonl", 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITE, str(path), str(first)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        first = points(path)[-1][0] - 10  # as from a checkpoint ten steps ago
    steps = [step for step, name, _ in points(path) if name == "loss"]
    assert steps == list(range(len(steps)))
    assert len(steps) > 100


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl"), pytest.raises(UserError, match="being written by another process"):
        Journal(tmp_path / "j.jsonl")
    Journal(tmp_path / "j.jsonl").close()


def test_not_a_number_and_infinities_come_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.log_metrics(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    values = {name: value for _, name, value in points(tmp_path / "j.jsonl")}
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


def test_damage_in_the_middle_is_skipped_and_reported_with_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "j.jsonl"
    good = encode_line({"t": 1, "event": "metrics", "step": 1, "values": {"x": 1.0}})
    path.write_bytes(good + b'{"eve\n' + good.replace(b"1", b"2"))
    with Journal(path) as journal:
        journal.log_metrics(1, {"x": 1.0})
        journal.log_metrics(2, {"x": 2.0})
    assert points(path) == [(1, "x", 1.0), (2, "x", 2.0)]
    problems = [event["problem"] for event, _ in read_events(path) if event["event"] == DAMAGED]
    assert len(problems) == 2
    assert f"{path} is damaged just before byte {len(good) + 6}" in problems[0]
    assert problems[0] in caplog.text


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    """The kernel cuts a write at this length and refuses the next one: a disk with that much room left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 40, 79])
def test_a_short_write_is_taken_back_and_the_point_can_be_told_again(tmp_path: Path, room: int) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.log_metrics(1, {"loss": 1.0}, time_ms=0)
        end = path.stat().st_size
        with no_file_longer_than(end + room), pytest.raises((InfrastructureError, UserError), match="jsonl"):
            journal.log_metrics(2, {"loss": 2.0}, time_ms=0)
        assert path.stat().st_size == end
        assert journal.last_step("loss") == 1
        journal.log_metrics(2, {"loss": 2.0})
        journal.flush()
    with Journal(path) as journal:
        journal.log_metrics(3, {"loss": 3.0})
    assert points(path) == [(1, "loss", 1.0), (2, "loss", 2.0), (3, "loss", 3.0)]


def test_a_point_left_out_earlier_is_taken_later(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        for step in (1, 2, 10**12, -5):
            journal.log_metrics(step, {"loss": 1.0})
    with Journal(path) as journal:
        for step in (-5, 1, 2, 3, 4096, 10**12):
            journal.log_metrics(step, {"loss": 1.0})
    assert [step for step, _, _ in points(path)] == [1, 2, 10**12, -5, 3, 4096]


def test_secrets_never_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.log_params({"hub.api_key": "k1k1k1k1", "uri": "http://me:pw123456@host/x", "lr": 0.1})
        journal.log_params({"note": "uses correct-horse"})
        journal.log_tags({"note": "uses correct-horse"})
        journal.log_dataset("d", "0", "s3://b/k?X-Amz-Signature=abc12345")
        journal.log_json("config.json", {"deep": [{"password": "pw123456"}]})
    text = path.read_text()
    for secret in ("k1k1k1k1", "pw123456", "correct-horse", "abc12345"):
        assert secret not in text
    assert "0.1" in text


def test_a_tag_is_told_again_only_with_another_text_also_by_the_next_owner(tmp_path: Path) -> None:
    def told(owner: int, *tags: dict[str, str]) -> list[dict[str, str]]:
        path = tmp_path / f"train.{owner:06d}.jsonl"
        with Journal(path) as journal:
            for one in tags:
                journal.log_tags(one)
        return [event["tags"] for event, _ in read_events(path)]

    assert told(1, {"a": "cpp", "b": "cpp"}, {"a": "cpp", "b": "torch"}) == [{"a": "cpp", "b": "cpp"}, {"b": "torch"}]
    assert told(2, {"a": "triton", "b": "torch"}) == [{"a": "triton"}]
    assert told(3, {"a": "cpp", "b": "torch"}) == [{"a": "cpp"}]
    assert told(3, {"a": "cpp", "b": "torch"}) == [{"a": "cpp"}]


def test_flushing_and_closing_twice_do_no_harm(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.flush()
    journal.close()
    journal.close()
    journal.flush()
    with pytest.raises(ValueError, match="is closed"):
        journal.log_params({"a": 1})
    assert os.path.getsize(tmp_path / "j.jsonl") == 0


def test_a_flipped_bit_anywhere_in_a_journal_is_reported_or_repaired(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.log_metrics(1, {"train/loss": 2.5, "valid/loss": float("nan")}, time_ms=5)
        journal.log_params({"a": "b"})
        journal.log_metrics(2, {"train/loss": float("-inf")}, time_ms=6)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            problems = [event["problem"] for event, _ in read_events(path) if event["event"] == DAMAGED]
            if position < len(whole) - 1:
                assert problems
                assert "j.jsonl is damaged" in problems[0]
            else:  # only the last line's end: the line itself is whole
                assert not problems
                Journal(path).close()
                assert path.read_bytes() == whole


def test_lines_without_a_checksum_are_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"t": 1, "event": "metrics", "step": 1}\n')
    ((event, _),) = read_events(path)
    assert event["event"] == DAMAGED
    assert "no checksum; an earlier version" in event["problem"]

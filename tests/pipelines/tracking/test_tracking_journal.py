from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DamagedError, UserError
from pipelines.tracking.journal import Journal, encode_line, read_events

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
    assert [step for step, name, _ in points(path) if name == "valid/loss"] == [4, 5, 6]


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


def test_damage_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(encode_line({"event": "tags", "tags": {}}) + b'{"eve\n')
    with pytest.raises(UserError, match=r"j\.jsonl is damaged just before byte 55"):
        Journal(path)


def test_secrets_never_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.log_params({"hub.api_key": "k1k1k1k1", "uri": "http://me:pw123456@host/x", "lr": 0.1})
        journal.set_tags({"note": "uses correct-horse"})
        journal.log_dataset("d", "0", "s3://b/k?X-Amz-Signature=abc12345")
        journal.log_json("config.json", {"deep": [{"password": "pw123456"}]})
    text = path.read_text()
    for secret in ("k1k1k1k1", "pw123456", "correct-horse", "abc12345"):
        assert secret not in text
    assert "0.1" in text


def test_flushing_and_closing_twice_do_no_harm(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.flush()
    journal.close()
    journal.close()
    journal.flush()
    with pytest.raises(ValueError, match="is closed"):
        journal.set_tags({"a": 1})
    assert os.path.getsize(tmp_path / "j.jsonl") == 0


def test_a_flipped_bit_anywhere_in_a_journal_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.log_metrics(1, {"train/loss": 2.5, "valid/loss": float("nan")}, time_ms=5)
        journal.set_tags({"a": "b"})
        journal.log_metrics(2, {"train/loss": float("-inf")}, time_ms=6)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedError, match=r"j\.jsonl is damaged"):
                list(read_events(path))


def test_lines_without_a_checksum_are_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"t": 1, "event": "metrics", "step": 1}\n')
    with pytest.raises(DamagedError, match=r"j\.jsonl.*no checksum; an earlier version"):
        list(read_events(path))

"""Which configuration is chosen, and what is kept of it. No GPU is here: timer and device are stand-ins."""

from __future__ import annotations

import json
import logging

import pytest
from triton.runtime.errors import OutOfResources

from kernels.gpu import tuning
from kernels.gpu.launch import Launch
from kernels.gpu.tuning import Config, choose

SMALL, LARGE, HUGE = Config({"block": 32}), Config({"block": 128}, 8, 3), Config({"block": 512}, 16)
TIMES_MS = {32: 2.0, 128: 1.0}


class Timer:
    """Stands in for a GPU: knows how long each block size takes, and that the largest does not fit."""

    def __init__(self) -> None:
        self.timed: list[int] = []

    def __call__(self, launches: list[Launch]) -> float:
        (launch,) = launches
        block = launch.constants["block"]
        self.timed.append(block)
        if block not in TIMES_MS:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return TIMES_MS[block]


@pytest.fixture
def timer(monkeypatch, tmp_path):
    timer = Timer()
    monkeypatch.setenv("BMOJO_AUTOTUNE", "1")
    monkeypatch.delenv("BMOJO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_time_ms", timer)
    monkeypatch.setattr(tuning, "_device_name", lambda: "NVIDIA H100 80GB/HBM3")
    tuning._remembered.cache_clear()
    yield timer
    tuning._remembered.cache_clear()


def plan(config: Config) -> list[Launch]:
    return [Launch(None, (1,), {}, dict(config.tiles))]


def tuned(candidates=(SMALL, LARGE, HUGE), key=(64, "bfloat16"), arch="sm_90"):
    return choose("scan", arch, candidates, key, plan)


def cache_file(tmp_path):
    (file,) = (tmp_path / "bmojo").iterdir()
    return file


def test_without_tuning_it_is_the_first_candidate(timer, monkeypatch):
    monkeypatch.delenv("BMOJO_AUTOTUNE")
    assert tuned() is SMALL
    assert timer.timed == []


def test_the_interpreter_and_single_candidates_are_never_timed(timer):
    assert tuned(arch=tuning.INTERPRETER) is SMALL
    assert tuned([HUGE]) is HUGE
    assert timer.timed == []


def test_the_fastest_that_fits_is_timed_once_and_remembered(timer):
    assert tuned() == LARGE
    assert tuned() == LARGE
    assert timer.timed == [32, 128, 512]
    assert tuned(key=(128, "bfloat16")) == LARGE
    assert timer.timed == [32, 128, 512] * 2


def test_another_process_reads_the_choice_from_the_file(timer, tmp_path):
    tuned()
    assert cache_file(tmp_path).name.startswith("tuning-NVIDIA-H100-80GB-HBM3-3.")
    tuning._remembered.cache_clear()  # as a new process would begin
    assert tuned() == LARGE
    assert timer.timed == [32, 128, 512]


def test_a_choice_that_is_no_candidate_any_more_is_made_again(timer):
    tuned()
    assert tuned([SMALL, HUGE]) == SMALL
    assert timer.timed == [32, 128, 512, 32, 512]


def test_where_nothing_fits_it_is_the_first_whose_launch_then_says_so(timer):
    assert tuned([HUGE, Config({"block": 1024})]) == HUGE


@pytest.mark.parametrize("content", ["{", "[1]", '{"scan": 3}', '{"scan": {"tiles": {}, "wraps": 4}}', "\xff"])
def test_a_corrupt_file_is_ignored_with_a_warning_and_replaced(timer, tmp_path, caplog, content):
    tuned()
    cache_file(tmp_path).write_bytes(content.encode("latin-1"))
    tuning._remembered.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert tuned() == LARGE
    assert "are not used" in caplog.text
    (kept,) = json.loads(cache_file(tmp_path).read_text()).values()
    assert kept == {"tiles": {"block": 128}, "num_warps": 8, "num_stages": 3, "max_registers": None}


def test_a_cache_that_cannot_be_written_only_warns(timer, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("os.replace", refuse)
    assert tuned() == LARGE
    assert "tuned again next time" in caplog.text


def test_choices_that_another_process_made_meanwhile_are_kept(timer, tmp_path):
    tuned()
    file = cache_file(tmp_path)
    file.write_text(json.dumps({"their key": {"tiles": {}}, **json.loads(file.read_text())}))
    tuned(key=(128, "bfloat16"))
    assert "their key" in json.loads(file.read_text())
    assert len(json.loads(file.read_text())) == 3

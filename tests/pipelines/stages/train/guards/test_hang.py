"""A training that hangs is told from one that works, and the report says which rank waits where."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from pipelines.stages.train.guards import pulse
from pipelines.stages.train.guards.hang import HangReport, Heard, is_hanging, is_silent
from pipelines.stages.train.guards.pulse import Sign, period_s
from pipelines.stages.train.guards.watchdog import process_state
from tests.pipelines.stages.train.guards.waiting_ranks import EVERY_S, Ranks
from tests.pipelines.waiting import wait_until


def sign(rank: int, age_s: float = 0.0, line: str = "loop.py:1 (run)", **changes: object) -> Sign:
    return Sign(rank, f"host{rank}", 100 + rank, 7, "computes", age_s, line)._replace(**changes)  # type: ignore[arg-type]  # of any field


def test_a_training_hangs_when_no_rank_gets_further() -> None:
    assert is_hanging([Heard(sign(0, age_s=11), 0), Heard(sign(1, age_s=1), 10)], after_s=10)
    assert not is_hanging([Heard(sign(0, age_s=11), 0), Heard(sign(1, age_s=1), 0)], after_s=10), "rank 1 works"
    assert is_hanging([Heard(sign(0), 0), Heard(sign(1), 11)], after_s=10), "rank 1 is silent while 0 waits for a disk"
    assert not is_hanging([], after_s=10), "it has not begun"


def test_signs_come_often_enough_to_tell_silence_before_a_hang() -> None:
    for hang_after_s in (10, 60, 300, 3600):
        silent_after_s = next(
            ago for ago in range(hang_after_s) if is_silent(Heard(sign(0), ago), period_s(hang_after_s))
        )
        assert silent_after_s <= hang_after_s


def test_the_message_names_silent_ranks_missing_ranks_and_where_the_others_wait() -> None:
    heard = [Heard(sign(0), 30)] + [Heard(sign(rank, age_s=30, line="t.py:9 (step)"), 0.5) for rank in (1, 2)]
    report = HangReport(4, 20, heard, {0: "its process is stopped"}, {1: "stack of one", 2: "stack of two"})
    message = report.message()
    assert "no worker got any further for 30 s (hang_after_s=20)" in message
    assert "Rank 0 (host host0, process 100) is silent: its process is stopped. It was last heard 30 s ago" in message
    assert "Rank 3 never told anything" in message
    assert "Ranks 1, 2 (as on host host1) wait in t.py:9 (step), at step 7: computes." in message
    silent = HangReport(2, 20, [Heard(sign(0), 21), Heard(sign(1), 0)], {0: "its process is stopped"}, {}).message()
    assert "a worker has told nothing for 21 s" in silent
    text = report.text()
    assert all(f"rank {rank}: host host{rank}, process {100 + rank}" in text for rank in range(3))
    assert text.index("---- rank 1\nstack of one") < text.index("---- rank 2\nstack of two")


def test_waiting_for_a_store_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "_PATIENT_S", 0.001)
    with pulse.patiently("waits for the store"):
        first = pulse._last
        wait_until(lambda: pulse._last.at > first.at)
    assert pulse._last.doing == first.doing == "waits for the store"


def test_a_message_about_many_ranks_stays_short() -> None:
    heard = [Heard(sign(rank, age_s=30, line=f"t.py:{rank % 7} (step)"), 0.5) for rank in range(512)]
    message = HangReport(512, 20, heard, {}, {}).message()
    assert len(message) < 1000
    assert "and 66 more" in message
    assert "3 more places are in the report" in message


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    processes = Ranks()
    yield processes
    processes.close()


def test_of_two_real_processes_the_stopped_one_is_silent_and_the_other_says_where_it_waits(ranks: Ranks) -> None:
    def all_step() -> bool:
        return len(heard := ranks.heard()) == 2 and min(each.sign.step for each in heard) > 3

    wait_until(all_step)
    assert not is_hanging(ranks.heard(), after_s=60)
    stopped = ranks.processes[0].pid
    assert stopped is not None
    assert "and its threads do not run" in process_state(stopped)
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(stopped).status() == psutil.STATUS_STOPPED)
    wait_until(lambda: is_hanging(ranks.heard(), after_s=3) and is_silent(ranks.heard()[0], EVERY_S))
    assert not is_silent(ranks.heard()[1], EVERY_S)
    ranks.wants_stacks.set()
    wait_until(lambda: bool(ranks.heard()) and 1 in ranks.stacks)
    silent = {0: process_state(stopped)}
    message = HangReport(2, 3, ranks.heard(), silent, ranks.stacks).message()
    assert f"process {stopped}) is silent: its process is stopped (SIGSTOP, or a debugger)" in message
    assert (
        f"process {ranks.processes[1].pid}) waits in tests/pipelines/stages/train/guards/waiting_ranks.py:" in message
    )
    assert "(_rank), in all_reduce(), at step" in message
    assert "waiting_ranks.py" in ranks.stacks[1].split("thread")[1], "the thread that trains comes first"
    assert "signs of life" in ranks.stacks[1]
    ranks.close()
    assert process_state(stopped) == "its process is gone"

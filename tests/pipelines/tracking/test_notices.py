"""What a stage's work warns of reaches whoever watches the run: once, in a line, and not without end."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipelines.tracking.journal import NOTICE, Journal, read_events
from pipelines.tracking.notices import LONGEST, MOST_ALIKE, warnings_noted
from pipelines.tracking.remote import RemoteJournal, remote_journal
from tests.pipelines.waiting import wait_until

OURS = logging.getLogger("pipelines.stages.some.module")


def notices(path: Path) -> list[str]:
    return [event["tags"][NOTICE] for event, _ in read_events(path) if event["event"] == "tags"]


def test_a_warning_is_a_notice_once_also_for_the_next_owner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2):
        with Journal(tmp_path / f"a.{number:06d}.jsonl") as journal, warnings_noted(journal):
            OURS.warning("%d of 273 documents were left out", 4)
            OURS.info("not worth a line")
            logging.getLogger("somebody.elses").warning("not ours")
    OURS.warning("nobody listens any more")
    assert notices(tmp_path / "a.000001.jsonl") == ["4 of 273 documents were left out"]
    assert notices(tmp_path / "a.000002.jsonl") == []
    assert caplog.text.count("4 of 273") == 2, "the log still has it"


def test_notices_told_in_turn_are_not_told_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl") as journal:
        for text in ("one", "two", "one", "two", "three"):
            journal.log_notice(text)
    assert notices(tmp_path / "a.jsonl") == ["one", "two", "three"]


def test_a_notice_is_one_line_and_one_place_tells_a_few(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal, warnings_noted(journal):
        for number in range(MOST_ALIKE + 3):
            OURS.warning("step %d was left out\nand more", number)
        OURS.warning("word " * 200)
    told = notices(path)
    assert told[0] == "step 0 was left out"
    assert told[MOST_ALIKE - 1] == f"step {MOST_ALIKE - 1} was left out (The log has others like it.)"
    assert len(told) == MOST_ALIKE + 1
    assert told[-1].endswith("word ...")
    assert len(told[-1]) <= LONGEST + 4


def test_what_tracking_says_of_itself_is_no_notice(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl") as journal, warnings_noted(journal):
        logging.getLogger("pipelines.tracking.remote").warning("The journal did not take it")
    assert notices(tmp_path / "a.jsonl") == []


def test_a_warning_does_no_harm_where_nothing_takes_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    with warnings_noted(journal):
        journal.close()
        OURS.warning("late")
    assert "late" in caplog.text


def test_workers_notices_come_through_the_actor_and_a_flush_repeats_none(tmp_path: Path, ray_cluster: None) -> None:
    path = tmp_path / "train.workers.jsonl"
    with Journal(tmp_path / "train.jsonl") as driver, remote_journal(driver) as journal:
        with warnings_noted(journal):
            OURS.warning("step 3 was left out")
            OURS.warning("step 5 was left out")
        wait_until(lambda: len(notices(path)) == 2)
        handle, journal._handle = journal._handle, None
        journal.log_notice("step 9 was left out")
        assert not journal.flush()
        journal._handle = handle
        assert journal.flush()
        assert isinstance(journal, RemoteJournal)
        assert journal._unconfirmed_notices == []
    assert notices(path) == [f"step {step} was left out" for step in (3, 5, 9)]

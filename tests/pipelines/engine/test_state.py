"""The state of a run, folded from its events: after any history that owners can leave."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine.event_log import Entry, Position
from pipelines.engine.events import (
    AttemptLost,
    Budget,
    Ended,
    Event,
    Failed,
    Finished,
    Noted,
    Planned,
    Progress,
    Queued,
    RunInfo,
    Sealed,
    Started,
    Status,
)
from pipelines.engine.state import RunState, after, fold

STAGES = ("a", "b", "c")
INFO = RunInfo(
    run_id="x-12345678",
    name="x",
    config={},
    config_path=None,
    created_at="2026-01-01T00:00:00.000+00:00",
    git_commit=None,
    fingerprints=dict.fromkeys(STAGES, "f" * 64),
    kinds=dict.fromkeys(STAGES, "count"),
)


def at(second: int) -> str:
    return (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second)).isoformat(timespec="milliseconds")


def started(second: int, stage: str, attempt: int = 1, resumed: bool = False) -> Started:
    return Started(
        at=at(second), stage=stage, attempt=attempt, resumed=resumed, artifact=f"artifacts/{stage}",
        log=f"logs/{stage}.{attempt}.log", pid=100 + attempt, host="here",
    )  # fmt: skip


def folded(*events: Event) -> RunState:
    state = fold(entries(events))
    assert state is not None
    return state


def entries(events: Sequence[Event]) -> list[Entry]:
    return [Entry(Position(1, number), event) for number, event in enumerate(events, start=1)]


def test_a_notice_stays_until_the_next_attempt_or_the_end() -> None:
    so_far = [Planned(at=at(0), info=INFO), started(1, "a"), Noted(at=at(2), stage="a", text="on 2 workers")]
    assert folded(*so_far).stages["a"].note == "on 2 workers"
    assert folded(*so_far, started(3, "a", attempt=2)).stages["a"].note is None
    assert folded(*so_far, Finished(at=at(3), stage="a", artifact="artifacts/a")).stages["a"].note is None


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """What up to four owners write: each plans, works on stages, and ends or is sealed at any point."""
    events: list[Event] = []
    finished: set[str] = set()
    for number in range(draw(st.integers(1, 4))):
        events.append(
            Planned(
                at=at(len(events)), event="resumed" if number else "planned", info=INFO, reused=tuple(sorted(finished))
            )
        )
        attempts = dict.fromkeys(STAGES, 0)
        open_stages = [stage for stage in STAGES if stage not in finished]
        running: set[str] = set()
        failed: set[str] = set()
        for _ in range(draw(st.integers(0, 12))):
            if not open_stages:
                break
            stage = draw(st.sampled_from(open_stages))
            now = at(len(events))
            if stage not in running:
                if draw(st.booleans()):
                    attempts[stage] += 1
                    running.add(stage)
                    events.append(started(len(events), stage, attempts[stage], number > 0))
                else:
                    events.append(Queued(at=now, stage=stage, reason="waits for room"))
                continue
            what = draw(st.sampled_from(["progress", "lost", "finished", "failed"]))
            if what == "progress":
                events.append(Progress(at=now, stage=stage, done=len(events), total=99, values={"loss": 1.0}))
                continue
            running.discard(stage)
            if what == "lost":
                events.append(
                    AttemptLost(
                        at=now,
                        stage=stage,
                        attempt=attempts[stage],
                        error="gone",
                        budget=Budget.RETRIES,
                        left=1,
                        pause_s=1,
                    )
                )
            else:
                open_stages.remove(stage)
                if what == "finished":
                    finished.add(stage)
                    events.append(Finished(at=now, stage=stage, artifact=f"artifacts/{stage}"))
                else:
                    failed.add(stage)
                    events.append(Failed(at=now, stage=stage, status=Status.FAILED, error="no"))
        if draw(st.booleans()):
            status = Status.FAILED if failed else Status.CANCELLED if len(finished) < 3 else Status.SUCCEEDED
            events.append(Ended(at=at(len(events)), status=status))
        events.append(Sealed(at=at(len(events)), by=number + 2))
    return events


@given(history=histories(), cut=st.integers(0, 60))
def test_folding_in_one_go_or_step_by_step_is_the_same(history: list[Event], cut: int) -> None:
    state = fold(entries(history[:cut]))
    for event in history[cut:]:
        state = after(state, event)
    assert state == fold(entries(history))


@given(history=histories())
def test_the_state_after_any_history(history: list[Event]) -> None:
    state = folded(*history)
    assert state.owners == sum(isinstance(event, Planned) for event in history)
    assert state.started_at == history[0].at, "of the first owner"
    assert set(state.stages) == set(STAGES)
    last = max(number for number, event in enumerate(history) if isinstance(event, Planned))
    ended = any(isinstance(event, Ended) for event in history[last:])
    assert (state.status is Status.RUNNING) is not ended
    for name, stage in state.stages.items():
        of_stage = [event for event in history if getattr(event, "stage", None) == name]
        starts = [event for event in of_stage if isinstance(event, Started)]
        assert stage.attempts == len(starts), "of all owners"
        if starts:
            assert stage.started_at == starts[-1].at
            assert stage.log == starts[-1].log
        finish = [event for event in of_stage if isinstance(event, Finished)]
        assert (stage.status is Status.SUCCEEDED) is bool(finish)
        if finish:
            assert stage.finished_at == finish[0].at
            assert stage.error is None
            assert not stage.reused
        if ended:
            assert stage.status not in (Status.QUEUED, Status.RUNNING), "nobody works on it any more"
        if stage.status is not Status.QUEUED:
            assert stage.reason is None
        progress = [event for event in of_stage if isinstance(event, Progress)]
        assert stage.done == (progress[-1].done if progress else None)


@given(history=histories())
def test_checking_a_finished_run_again_changes_only_when_it_was_checked(history: list[Event]) -> None:
    before = folded(*history)
    if before.status is not Status.SUCCEEDED:
        return
    again = folded(
        *history,
        Planned(at=at(1000), event="resumed", info=INFO, reused=STAGES),
        *(Finished(at=at(1001), stage=name, artifact=f"artifacts/{name}", recorded_at=at(1)) for name in STAGES),
        Ended(at=at(1002), status=Status.SUCCEEDED),
    )
    assert again.checked_at == at(1002)
    assert (again.started_at, again.finished_at) == (before.started_at, before.finished_at)
    assert again.stages == before.stages


def test_a_resume_that_does_not_know_the_overrides_keeps_them() -> None:
    given = Planned(at=at(0), info=INFO.model_copy(update={"overrides": ("train.lr=1",)}))
    resumed = Planned(at=at(1), event="resumed", info=INFO)
    assert folded(given, resumed).info.overrides == ("train.lr=1",)
    without = resumed.model_copy(update={"info": INFO.model_copy(update={"overrides": ()})})
    assert folded(given, without).info.overrides == ()


def test_nothing_happened_before_the_plan() -> None:
    assert fold([]) is None
    assert fold(entries([Sealed(by=2)])) is None
    assert folded(Sealed(by=2), Planned(info=INFO)).owners == 1


def test_events_of_other_stages_change_nothing() -> None:
    planned = Planned(at=at(0), info=INFO)
    assert folded(planned, started(1, "unknown"), Sealed(by=2)) == folded(planned)


def test_a_stage_that_was_done_before_its_owner_said_so_keeps_its_times() -> None:
    """The record is there, the event `finished` is not: the next owner finds it."""
    state = folded(
        Planned(at=at(0), info=INFO),
        started(1, "a"),
        Planned(at=at(10), event="resumed", info=INFO, reused=("a",)),
        Finished(at=at(11), stage="a", artifact="artifacts/a", recorded_at=at(5)),
    )
    assert (state.stages["a"].started_at, state.stages["a"].finished_at) == (at(1), at(5))
    assert not state.stages["a"].reused


def test_a_result_of_another_run_has_no_times_here() -> None:
    state = folded(
        Planned(at=at(0), info=INFO, reused=("a",)),
        Finished(at=at(1), stage="a", artifact="artifacts/other", recorded_at=at(-99)),
    )
    stage = state.stages["a"]
    assert stage.reused
    assert (stage.started_at, stage.finished_at, stage.artifact) == (None, None, "artifacts/other")


def test_a_result_that_was_deleted_is_made_again() -> None:
    state = folded(
        Planned(at=at(0), info=INFO),
        started(1, "a"),
        Finished(at=at(2), stage="a", artifact="artifacts/a"),
        Planned(at=at(10), event="resumed", info=INFO, reused=()),
    )
    assert state.stages["a"].status is Status.PENDING
    assert state.stages["a"].attempts == 1
    again = folded(
        Planned(at=at(0), info=INFO),
        started(1, "a"),
        Finished(at=at(2), stage="a", artifact="artifacts/a"),
        Planned(at=at(10), event="resumed", info=INFO, reused=()),
        started(11, "a"),
        Finished(at=at(12), stage="a", artifact="artifacts/a"),
        Ended(at=at(13), status=Status.SUCCEEDED),
    )
    assert (again.stages["a"].started_at, again.stages["a"].finished_at) == (at(11), at(12))
    assert again.finished_at == at(13)


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.RESUMABLE, Status.FAILED])
def test_what_was_under_way_at_the_end_is_resumable_or_cancelled(status: Status) -> None:
    state = folded(
        Planned(at=at(0), info=INFO),
        started(1, "a"),
        Queued(at=at(1), stage="b", reason="waits for room"),
        Ended(at=at(2), status=status),
    )
    expected = Status.CANCELLED if status is Status.CANCELLED else Status.RESUMABLE
    assert [stage.status for stage in state.stages.values()] == [expected, expected, Status.PENDING]
    assert all(stage.reason is None for stage in state.stages.values())

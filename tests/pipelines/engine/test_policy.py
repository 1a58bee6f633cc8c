"""What follows the end of an attempt: properties over any sequence of failures."""

from __future__ import annotations

from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine.events import Budget, Status
from pipelines.engine.failures import EXIT_RESUMABLE, EXIT_USER, Failure
from pipelines.engine.policy import LONGEST_PAUSE_S, Tally, next_attempt
from tests.pipelines.engine.counting_pipeline import CountConfig

ERROR = Failure(Status.FAILED, "a bug", None, 70, may_pass=True)
LOSS = Failure(Status.RESUMABLE, "a node is gone", None, EXIT_RESUMABLE, may_pass=True, is_loss=True)
USERS = Failure(Status.FAILED, "no such file", None, EXIT_USER)

configs = st.builds(
    CountConfig,
    retries=st.integers(0, 5),
    lost_retries=st.integers(0, 5),
    backoff_s=st.floats(0, 1e6, allow_nan=False),
)
Round = tuple[Literal["error", "loss"], int]
rounds = st.lists(st.tuples(st.sampled_from(["error", "loss"]), st.integers(0, 4)), max_size=40)


@given(config=configs, rounds=rounds)
def test_budgets_are_kept_and_renewed_by_progress_alone(config: CountConfig, rounds: list[Round]) -> None:
    tally, furthest = Tally(), 0
    used = {Budget.RETRIES: 0, Budget.LOST_RETRIES: 0}  # since the stage last got further
    for what, mark in rounds:
        budget = Budget.RETRIES if what == "error" else Budget.LOST_RETRIES
        allowed = config.retries if what == "error" else config.lost_retries
        if mark > furthest:
            furthest = mark
            used = dict.fromkeys(used, 0)
        retry = next_attempt(config, tally, ERROR if what == "error" else LOSS, mark)
        used[budget] += 1
        if used[budget] > allowed:
            assert retry is None
            return
        assert retry is not None
        assert retry.budget is budget
        assert retry.left == allowed - used[budget] >= 0
        assert {each: retry.tally.used(each) for each in used} == used, "the other budget is untouched"
        assert retry.tally.mark == furthest
        assert min(config.backoff_s, LONGEST_PAUSE_S) <= retry.pause_s <= LONGEST_PAUSE_S
        tally = retry.tally


@given(config=configs, mark=st.integers(0, 9))
def test_errors_of_the_users_are_never_retried(config: CountConfig, mark: int) -> None:
    assert next_attempt(config, Tally(), USERS, mark) is None


@given(config=configs, what=st.sampled_from([ERROR, LOSS]), extra=st.integers(0, 3))
def test_a_stage_that_never_gets_further_ends(config: CountConfig, what: Failure, extra: int) -> None:
    tally, attempts = Tally(mark=extra), 0
    while (retry := next_attempt(config, tally, what, extra)) is not None:
        tally = retry.tally
        attempts += 1
        assert attempts <= 5
    assert attempts == (config.lost_retries if what.is_loss else config.retries)


def test_pauses_double_up_to_five_minutes() -> None:
    config = CountConfig(lost_retries=400, backoff_s=2.0)
    tally, pauses = Tally(), []
    for _ in range(300):
        retry = next_attempt(config, tally, LOSS, 0)
        assert retry is not None
        tally = retry.tally
        pauses.append(retry.pause_s)
    assert pauses[:9] == [2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert set(pauses[8:]) == {300}


def test_errors_and_losses_use_up_budgets_of_their_own() -> None:
    config = CountConfig(retries=1, lost_retries=1)
    first = next_attempt(config, Tally(), ERROR, 0)
    assert first is not None
    second = next_attempt(config, first.tally, LOSS, 0)
    assert second is not None
    assert next_attempt(config, second.tally, ERROR, 0) is None
    assert next_attempt(config, second.tally, LOSS, 0) is None
    renewed = next_attempt(config, second.tally, ERROR, 1)
    assert renewed is not None
    assert renewed.tally == Tally(retries=1, lost_retries=0, mark=1)

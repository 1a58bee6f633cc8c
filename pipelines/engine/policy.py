"""What follows the end of an attempt: another one, after a pause, or the end of the stage. Pure; no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.engine.events import Budget
from pipelines.engine.failures import Failure
from pipelines.engine.stage import StageConfig

LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True)
class Tally:
    """Attempts of a stage that ended without a result since it last got further, by the budget they used."""

    retries: int = 0
    lost_retries: int = 0
    mark: int = 0  # how far the stage was (Stage.mark)

    def used(self, budget: Budget) -> int:
        """Attempts that used this budget."""
        return self.retries if budget is Budget.RETRIES else self.lost_retries


@dataclass(frozen=True)
class Retry:
    """Another attempt follows."""

    tally: Tally
    budget: Budget
    left: int
    pause_s: float


def next_attempt(config: StageConfig, tally: Tally, failure: Failure, mark: int) -> Retry | None:
    """Judge the end of an attempt. Returns None if the stage has failed for good.

    Args: mark: how far the stage is now.
    """
    if not failure.may_pass:
        return None
    if mark > tally.mark:
        tally = Tally(mark=mark)
    budget = Budget.LOST_RETRIES if failure.is_loss else Budget.RETRIES
    allowed = config.lost_retries if failure.is_loss else config.retries
    used = tally.used(budget) + 1
    if used > allowed:
        return None
    tally = replace(tally, **{budget.value: used})
    attempts = tally.retries + tally.lost_retries
    pause_s = min(config.backoff_s * 2.0 ** min(attempts - 1, 30), LONGEST_PAUSE_S)
    return Retry(tally, budget, allowed - used, pause_s)

"""How a run ended: the failure that its user should know first, and the last event of its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.engine.events import Ended, EndStatus, Status
from pipelines.engine.failures import EXIT_CANCELLED, Failure
from pipelines.engine.runs import Run

_GRAVEST_FIRST = (Status.FAILED, Status.CANCELLED, Status.RESUMABLE)


@dataclass(frozen=True)
class Verdict:
    """The failure, None after success, and its stage, None if it is of the run as a whole."""

    stage: str | None
    failure: Failure | None

    @property
    def status(self) -> EndStatus:
        """Status of the run."""
        return self.failure.status if self.failure else Status.SUCCEEDED

    def event(self, run: Run) -> Ended:
        """The event that ends the log. A traceback that is of no stage goes into the run's folder."""
        if self.failure is None:
            return Ended(status=self.status, exit_code=0)
        text = self.failure.text
        if self.failure.details and self.stage is None:
            text += f" (traceback: {run.write_text('errors/start.txt', self.failure.details)})"
        if self.status is Status.CANCELLED:
            return Ended(event="cancelled", status=self.status, error=text, exit_code=EXIT_CANCELLED)
        return Ended(status=self.status, error=text, exit_code=self.failure.exit_code)


def gravest(failures: Mapping[str, Failure]) -> Verdict:
    """The verdict on a run in which these stages failed, by name; there is at least one."""
    statuses = {failure.status for failure in failures.values()}
    gravest_status = next(status for status in _GRAVEST_FIRST if status in statuses)
    return next(Verdict(name, failure) for name, failure in failures.items() if failure.status is gravest_status)

"""Which failure is the run's."""

from __future__ import annotations

import pytest

from pipelines.engine.events import Status
from pipelines.engine.failures import EXIT_CANCELLED, EXIT_RESUMABLE, EXIT_USER, Failure
from pipelines.engine.verdict import Verdict, gravest

FAILED = Failure(Status.FAILED, "no such file", None, EXIT_USER)
CANCELLED = Failure(Status.CANCELLED, "cancelled", None, EXIT_CANCELLED)
RESUMABLE = Failure(Status.RESUMABLE, "a node is gone", None, EXIT_RESUMABLE)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({"first": RESUMABLE}, Verdict("first", RESUMABLE)),
        ({"first": RESUMABLE, "second": CANCELLED}, Verdict("second", CANCELLED)),
        ({"first": CANCELLED, "second": RESUMABLE, "third": FAILED}, Verdict("third", FAILED)),
    ],
)
def test_the_gravest_failure_is_the_runs(failures: dict[str, Failure], expected: Verdict) -> None:
    assert gravest(failures) == expected
    assert gravest(failures).status is expected.status


def test_a_run_without_failures_succeeded() -> None:
    assert Verdict(None, None).status is Status.SUCCEEDED

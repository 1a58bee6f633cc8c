"""Several stages at once: overlap, room, failures, retries and ends, with attempts in threads of this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.engine.events import AttemptLost, Failed, Finished, Queued, Status
from pipelines.engine.lease import Lease
from pipelines.engine.processes import StageJob
from pipelines.engine.runs import Run, artifact_lease_relpath
from pipelines.engine.scheduler import run_pipeline
from pipelines.engine.stage import Resources
from pipelines.storage import Storage, open_storage
from tests.pipelines.engine.counting_pipeline import InThreads, NoCluster, nowhere
from tests.pipelines.engine.toy_kinds import Toys, events_of, names_of, run_toys, toy_pipeline, when

TWO_CPUS = Resources(cpus_per_worker=2)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "store")


def run_of(storage: Storage, **stages: dict[str, object]) -> Run:
    pipeline = toy_pipeline(storage, **stages)
    return pipeline.run_of(pipeline.plan())


class NoProcesses(InThreads):
    """A launcher that must not be asked."""

    def prepare(self) -> None:
        raise AssertionError("a process was started")


def test_stages_that_do_not_need_one_another_overlap(storage: Storage) -> None:
    result = run_toys(
        storage, a={}, b={"needs": ["a"], "seconds": 1.0}, c={"needs": ["a"], "seconds": 1.0}, d={"needs": ["b", "c"]}
    )
    assert result.status is Status.SUCCEEDED
    a, b, c, d = (result.stages[name].output for name in "abcd")
    assert max(b.began_at, c.began_at) < min(b.ended_at, c.ended_at)
    assert a.ended_at <= min(b.began_at, c.began_at)
    assert d.began_at >= max(b.ended_at, c.ended_at)


def test_a_failed_branch_stops_only_what_needs_it(storage: Storage) -> None:
    result = run_toys(
        storage, bad={"deed": "user"}, after={"needs": ["bad"]}, good={"seconds": 0.5}, last={"needs": ["good"]}
    )
    assert result.status is Status.FAILED
    assert result.failed_stage == "bad"
    state = result.run.state()
    assert {name: stage.status for name, stage in state.stages.items()} == {
        "bad": Status.FAILED, "after": Status.PENDING, "good": Status.SUCCEEDED, "last": Status.SUCCEEDED,
    }  # fmt: skip
    assert names_of(result.run, "after") == []


def test_two_failures_are_both_told_and_the_gravest_is_the_runs(storage: Storage) -> None:
    result = run_toys(storage, lost={"deed": "lose", "lost_retries": 0, "times": 9}, bad={"deed": "user", "seconds": 1})
    assert set(result.failures) == {"lost", "bad"}
    assert (result.failed_stage, result.status) == ("bad", Status.FAILED)


def test_a_stage_may_stop_the_run(storage: Storage) -> None:
    result = run_toys(
        storage, bad={"deed": "user", "on_failure": "stop"}, long={"seconds": 300}, after={"needs": ["long"]}
    )
    state = result.run.state()
    assert result.status is Status.FAILED
    assert result.failed_stage == "bad"
    assert state.stages["long"].status is Status.RESUMABLE
    assert state.stages["long"].error == "stopped because bad failed"
    assert state.stages["after"].status is Status.PENDING


def test_errors_are_retried_within_their_budget(storage: Storage) -> None:
    result = run_toys(storage, flaky={"deed": "raise", "times": 2, "retries": 2, "backoff_s": 0.05})
    assert result.status is Status.SUCCEEDED
    assert result.stages["flaky"].output.attempts == 3
    lost = [event for event in events_of(result.run, "flaky") if isinstance(event, AttemptLost)]
    assert [(event.attempt, event.budget, event.left, event.pause_s) for event in lost] == [
        (1, "retries", 1, 0.05), (2, "retries", 0, 0.1),
    ]  # fmt: skip
    assert result.run.state().stages["flaky"].attempts == 3


def test_a_stage_that_gets_further_has_its_retries_anew(storage: Storage) -> None:
    result = run_toys(storage, slow={"deed": "raise", "times": 5, "retries": 1, "gets_further": True})
    assert result.status is Status.SUCCEEDED
    assert result.stages["slow"].output.attempts == 6


def test_a_stage_that_gets_no_further_fails_for_good(storage: Storage) -> None:
    result = run_toys(storage, bad={"deed": "raise", "times": 9, "retries": 1})
    assert names_of(result.run, "bad") == ["started", "attempt_lost", "started", "failed"]
    assert result.failures["bad"].text == "RuntimeError: a bug"


def test_the_pause_between_attempts_is_kept_while_others_work(storage: Storage) -> None:
    result = run_toys(storage, flaky={"deed": "raise", "retries": 1, "backoff_s": 1.2}, other={"seconds": 0.1})
    attempts = [result.stages["flaky"].artifact.read_json(f"attempts/{number}.json")["at"] for number in (1, 2)]
    assert attempts[1] - attempts[0] >= 1.2
    assert result.stages["other"].output.ended_at < attempts[1]


def test_two_stages_that_do_not_fit_run_one_after_the_other(storage: Storage) -> None:
    stages = {name: {"seconds": 0.6, "resources": TWO_CPUS} for name in "ab"}
    result = run_toys(storage, cluster=Toys({"CPU": 3.0}), **stages)
    assert result.status is Status.SUCCEEDED
    assert result.stages["b"].output.began_at >= result.stages["a"].output.ended_at
    queued, *rest = events_of(result.run, "b")
    assert isinstance(queued, Queued)
    asked = "asks for 1 x 2 CPU; the cluster has 3 CPU, 0 GPU"
    assert queued.reason == f"waits for room beside the running stages: {asked}"
    assert [event.event for event in rest] == ["started", "finished"], "told once, not at every look"


def test_a_stage_that_fits_overtakes_one_that_does_not(storage: Storage) -> None:
    result = run_toys(
        storage, cluster=Toys({"CPU": 3.0}), a={"seconds": 1.0, "resources": TWO_CPUS}, b={"resources": TWO_CPUS}, c={}
    )
    ended = {name: node.output.ended_at for name, node in result.stages.items()}
    assert ended["c"] < ended["a"] < ended["b"]


def test_copies_with_one_fingerprint_are_made_once(storage: Storage) -> None:
    """As foreach makes them if they differ only in fields that do not count."""
    result = run_toys(
        storage, one={"seed": 7, "seconds": 0.7}, two={"seed": 7, "seconds": 0.8}, all={"needs": ["one", "two"]}
    )
    assert result.status is Status.SUCCEEDED
    assert result.stages["one"].output == result.stages["two"].output
    assert names_of(result.run, "one") == ["started", "finished"]
    assert names_of(result.run, "two") == ["queued", "finished"]
    assert result.run.state().stages["two"].reused
    assert len(storage.list("artifacts/toy")) == 2


def test_a_copy_takes_over_if_the_first_one_fails(storage: Storage) -> None:
    result = run_toys(storage, one={"seed": 7, "deed": "user", "seconds": 0.2}, two={"seed": 7})
    assert names_of(result.run, "one") == ["started", "failed"]
    assert names_of(result.run, "two") == ["queued", "started", "finished"]


def test_an_artifact_that_another_run_makes_meanwhile_is_reused(storage: Storage) -> None:
    """The other run is at it when the process of this one begins."""
    planned = toy_pipeline(storage, a={"seconds": 0.2}).plan()[0]
    lease = artifact_lease_relpath("toy", "a", planned.fingerprint.digest)

    class Late(InThreads):
        def start(self, job: StageJob, on_end):  # type: ignore[no-untyped-def]
            if job.attempt == 1:
                self.held = Lease.acquire(storage, lease, "Artifact")
                when(lambda: "queued" in names_of(run, "a"), self._make)
            return super().start(job, on_end)

        def _make(self) -> None:
            self.held.release()
            other = toy_pipeline(storage, a={"seconds": 0.2}, more={})
            assert run_pipeline(other, nowhere(), NoCluster(), launcher=InThreads()).status is Status.SUCCEEDED

    run = run_of(storage, a={"seconds": 0.2})
    result = run_toys(storage, launcher=Late(), a={"seconds": 0.2})
    assert result.status is Status.SUCCEEDED
    assert result.stages["a"].output.attempts == 1, "one of the two made it"


def test_a_run_is_cancelled_while_its_only_stage_is_queued(storage: Storage) -> None:
    planned = toy_pipeline(storage, a={}).plan()[0]
    run = run_of(storage, a={})
    with Lease.acquire(storage, artifact_lease_relpath("toy", "a", planned.fingerprint.digest), "Artifact"):
        when(lambda: run.exists() and "queued" in names_of(run, "a"), run.request_cancel)
        result = run_toys(storage, a={})
    assert result.status is Status.CANCELLED
    assert names_of(run) == ["planned", "queued", "cancelled"]
    assert run.state().stages["a"].status is Status.CANCELLED
    assert run_toys(storage, a={}).status is Status.SUCCEEDED


def test_a_run_is_cancelled_while_two_stages_work(storage: Storage) -> None:
    stages = {"a": {"seconds": 300}, "b": {"seconds": 300}, "c": {"needs": ["a"]}}
    run = run_of(storage, **stages)
    when(lambda: run.exists() and names_of(run).count("started") == 2, run.request_cancel)
    result = run_toys(storage, **stages)
    assert result.status is Status.CANCELLED
    assert [stage.status for stage in run.state().stages.values()] == ["CANCELLED", "CANCELLED", "PENDING"]


def test_an_attempt_takes_no_longer_than_it_may(storage: Storage) -> None:
    result = run_toys(storage, slow={"deed": "hang", "timeout_s": 0.5, "retries": 1}, other={"seconds": 0.2})
    assert result.status is Status.SUCCEEDED
    lost = [event for event in events_of(result.run, "slow") if isinstance(event, AttemptLost)]
    assert [(event.budget, event.error.partition(" and")[0]) for event in lost] == [
        ("retries", "took longer than its timeout_s=0.5")
    ]
    failed = run_toys(storage, slow={"seed": 9, "deed": "hang", "timeout_s": 0.3})
    assert failed.status is Status.RESUMABLE
    assert isinstance(events_of(failed.run, "slow")[-1], Failed)


def test_a_run_with_nothing_to_do_writes_two_events_and_starts_nothing(storage: Storage) -> None:
    stages = {"a": {}, "b": {"needs": ["a"]}, "c": {}}
    first = run_toys(storage, **stages).run
    cluster = Toys()
    before = events_of(first)
    result = run_toys(storage, cluster=cluster, launcher=NoProcesses(), **stages)
    assert result.status is Status.SUCCEEDED
    assert set(result.stages) == set(stages)
    assert [event.event for event in events_of(first)[len(before) :]] == ["sealed", "resumed", "ended"]
    assert cluster.starts == 0
    assert first.state().checked_at is not None


def test_what_another_run_made_is_told_once(storage: Storage) -> None:
    run_toys(storage, a={})
    result = run_toys(storage, a={}, b={})
    assert [type(event) for event in events_of(result.run, "a")] == [Finished]
    again = run_toys(storage, a={}, b={})
    assert again.run.run_id == result.run.run_id
    assert names_of(again.run, "a") == ["finished"]
    assert again.run.state().stages["a"].reused

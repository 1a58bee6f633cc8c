"""Starting and joining Ray: what goes wrong, and who can fix it."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import exceptions

from base.errors import UserError
from data.errors import DataError
from pipelines import cluster
from pipelines.config import ClusterConfig
from pipelines.engine.process import ProcessIdentity
from pipelines.engine.stage import Resources, StageConfig
from pipelines.errors import InfrastructureError, LostError
from pipelines.neuron import runtime
from pipelines.ray_errors import explained_ray, is_lost_process
from pipelines.stages.tasks import user_errors


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("nonsense", UserError, "is not an address"),
        ("head:0", UserError, "is not an address"),
        ("head:99999", UserError, "is not an address"),
        ("ray://head", UserError, "is not an address"),
        ("no-such-host.invalid:6379", UserError, "there is no machine no-such-host.invalid"),
        ("127.0.0.1:{closed}", UserError, "nothing listens on port"),
        ("ray://127.0.0.1:{closed}", UserError, "nothing listens on port"),
    ],
)
def test_an_address_that_cannot_be_joined_is_said_at_once(
    address: str, error: type[Exception], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = address.format(closed=closed.getsockname()[1])
        with pytest.raises(error, match=words):
            cluster.join(address)
    assert f"Connecting to the Ray cluster at {address}" in caplog.text


def test_a_machine_that_does_not_answer_is_the_infrastructures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_REACH_S", 0.5)
    with socket.socket() as full:  # its queue is full: the next connection gets no answer, as from a dead machine
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        callers = [socket.socket() for _ in range(3)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        with pytest.raises(InfrastructureError, match="does not answer"):
            cluster._require_reachable(f"127.0.0.1:{full.getsockname()[1]}")
        for caller in callers:
            caller.close()


def failing_starts(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[dict[str, Any]]:
    """ray.init raises `errors`, one per call, and then succeeds. Ray cannot be made to time out in time for a test."""
    calls: list[dict[str, Any]] = []
    left = list(errors)

    def init(**options: Any) -> None:
        calls.append(options)
        if left:
            raise left.pop(0)

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    return calls


TIMED_OUT = Exception("The current node timed out during startup. This could happen because some of the raylet failed")


def test_a_start_that_timed_out_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing_starts(monkeypatch, TIMED_OUT)
    cluster.ensure_cluster(ClusterConfig(num_cpus=2), 2)
    assert len(calls) == 2


def test_neuron_cores_that_ray_would_not_find_are_told_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "num_cores", lambda: 4)
    on_cpus, on_cores = (
        StageConfig(kind="none", resources=Resources(neuron_cores_per_worker=cores)) for cores in (0, 1)
    )
    assert cluster.neuron_cores_for([on_cpus]) == 0
    assert cluster.neuron_cores_for([on_cpus, on_cores]) == 4
    calls = failing_starts(monkeypatch)
    cluster.ensure_cluster(ClusterConfig(), 2)
    cluster.ensure_cluster(ClusterConfig(), 2, 4)
    assert [call["resources"] for call in calls] == [None, {"neuron_cores": 4}]


@pytest.mark.parametrize("error", [TIMED_OUT, RuntimeError("GCS is gone"), ConnectionError("no GCS"), TimeoutError()])
def test_a_start_that_fails_twice_is_the_infrastructures(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    calls = failing_starts(monkeypatch, error, error)
    with pytest.raises(
        InfrastructureError, match=r"did not start on this machine, twice.*the same command resumes|The"
    ):
        cluster.ensure_cluster(ClusterConfig(num_cpus=2), 2)
    assert len(calls) == 2


def test_a_full_disk_at_the_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing_starts(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/tmp/ray"))
    with pytest.raises(InfrastructureError, match=r"/tmp/ray: No space left on device. Make room"):
        cluster.ensure_cluster(ClusterConfig(num_cpus=2), 2)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [ConnectionError("Failed to connect"), RuntimeError("Version mismatch")])
def test_a_cluster_that_answers_but_takes_nobody_in_is_told_with_the_likely_cause(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing_starts(monkeypatch, error)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            InfrastructureError, match=rf"{address}: .* does not take us in .*{error}.*RAY_AUTH_MODE=token"
        ):
            cluster.join(address)


@pytest.mark.parametrize(("length", "is_short"), [(20, False), (88, True), (300, True)])
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_temporary_directory_is_not_used_for_sockets(
    monkeypatch: pytest.MonkeyPatch, variable: str, length: int, is_short: bool
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/" + "x" * (length - 1))
    chosen = cluster._short_temp_dir()
    assert (chosen is not None) == is_short
    if chosen is not None:
        assert len(f"{chosen}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") <= 107
        assert Path(chosen).is_dir()


def test_a_ray_job_works_on_the_cluster_it_was_submitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert cluster.cluster_address(ClusterConfig()) == "local"
    job = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}  # as Ray gives it to an entry point
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert ProcessIdentity.of_this_process().ray_job == "raysubmit_1"
    assert cluster.cluster_address(ClusterConfig()) == "auto"
    assert cluster.cluster_address(ClusterConfig(address="head:6379")) == "head:6379"


def task_error(cause: Exception) -> Exception:
    error: Exception = exceptions.RayTaskError("f", "traceback", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: task_error(UserError("u")), UserError),
        (lambda: task_error(InfrastructureError("i")), InfrastructureError),
        (lambda: task_error(DataError("d")), DataError),
        (lambda: task_error(OSError(errno.ENOSPC, "No space left on device")), InfrastructureError),
        (lambda: task_error(PermissionError(errno.EACCES, "Permission denied", "/x")), UserError),
        (lambda: task_error(ConnectionResetError("gone")), InfrastructureError),
        (lambda: task_error(ValueError("a bug")), ValueError),
        (lambda: task_error(RuntimeError("SafetensorError: I/O error: No space left on device")), InfrastructureError),
        (lambda: exceptions.WorkerCrashedError(), LostError),
        (lambda: exceptions.LocalRayletDiedError(), LostError),
        (lambda: exceptions.NodeDiedError("x"), LostError),
        (lambda: exceptions.OutOfMemoryError("x"), InfrastructureError),
        (lambda: exceptions.RaySystemError("x"), LostError),
        (lambda: exceptions.GetTimeoutError("x"), LostError),
        (lambda: exceptions.TaskUnschedulableError("x"), LostError),
        (lambda: exceptions.ActorDiedError(), LostError),
        (lambda: ConnectionError("ray client connection lost"), LostError),
    ],
)
def test_errors_of_tasks_keep_their_type_and_rays_become_ours(
    make: Callable[[], Exception], expected: type[Exception]
) -> None:
    with pytest.raises(Exception) as caught, user_errors(), explained_ray("Task x"):
        raise make()
    assert type(caught.value) is expected
    assert "traceback" not in str(caught.value)


def test_every_error_class_of_ray_is_judged() -> None:
    classes = [
        value
        for value in vars(exceptions).values()
        if isinstance(value, type)
        and issubclass(value, exceptions.RayError)
        and value is not exceptions.RayTaskError
        and not issubclass(value, exceptions.RayTaskError)
    ]
    assert len(classes) > 25
    for error_class in classes:
        plain = {"__init__": lambda self: None, "__str__": lambda self: "x"}  # their arguments differ
        error = type(error_class.__name__, (error_class,), plain | {"actor_init_failed": False})()
        with pytest.raises((UserError, InfrastructureError)) as caught, explained_ray("Task x"):
            raise error
        is_users = error_class is exceptions.AuthenticationError
        assert isinstance(caught.value, UserError) == is_users, error_class


def test_a_lost_process_is_told_from_a_bug() -> None:
    assert is_lost_process(exceptions.ActorDiedError())
    assert is_lost_process(type("WorkerHealthCheckFailedError", (Exception,), {})("A worker health check failed."))
    assert is_lost_process(RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost_process(type("DistBackendError", (RuntimeError,), {})("NCCL communicator was aborted"))
    assert not is_lost_process(RuntimeError("The size of tensor a must match"))
    assert not is_lost_process(AssertionError())


@pytest.mark.parametrize("error", [UserError("u"), InfrastructureError("i")])
def test_our_errors_survive_pickling(error: Exception) -> None:
    import pickle

    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))

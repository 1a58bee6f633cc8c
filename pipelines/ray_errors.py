"""What Ray's errors mean: the one place that knows their classes, for whoever calls Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from base.errors import UserError
from pipelines.errors import InfrastructureError, LostError

_LOST_TYPES = {
    "DistBackendError",  # torch.distributed, when a rank is gone
    "DistNetworkError",
    "DistStoreError",
    "WorkerHealthCheckFailedError",  # Ray Train, of a worker or its machine
    "WorkerHealthCheckTimeoutError",
    "WorkerGroupStartupFailedError",
    "BroadcastCollectiveTimeoutError",
    "PreemptionError",
    "NCCLHangError",
}
_LOST_PEER_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


@contextmanager
def explained_ray(what: str) -> Iterator[None]:
    """Turn Ray's errors into ours; `what` was being done. What a task itself raised is raised as it was."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:  # which is also of the class that the task raised
        raise explain_ray(error, what) from error
    except (UserError, InfrastructureError):
        raise
    except RayError as error:
        raise explain_ray(error, what) from error
    except ConnectionError as error:  # of Ray Client, whose server is gone
        raise LostError(f"{what}: the connection to the Ray cluster is lost ({_first_line(error)}).") from error


def explain_ray(error: Exception, what: str) -> BaseException:
    """The error of ours for one of Ray's; for RayTaskError, the error that the task raised."""
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, exceptions.RayError):
            return explain_ray(cause, what)
        return cause if isinstance(cause, BaseException) else error
    if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
        return RuntimeError(f"{what}: {error}")  # not lost: it cannot be made
    if isinstance(error, exceptions.AuthenticationError):
        return UserError(
            f"{what}: the Ray cluster refuses the token. Set RAY_AUTH_MODE=token, and the cluster's token in "
            f"~/.ray/auth_token or RAY_AUTH_TOKEN. ({_first_line(error)})"
        )
    if isinstance(error, exceptions.OutOfMemoryError):
        return InfrastructureError(
            f"{what}: a machine ran out of memory, so Ray ended a process ({_first_line(error)}). Free memory there, "
            "or let fewer workers share it (resources.num_workers)."
        )
    if isinstance(error, exceptions.OutOfDiskError | exceptions.ObjectStoreFullError):
        return InfrastructureError(
            f"{what}: a machine's disk or Ray's object store is full ({_first_line(error)}). Make room."
        )
    return LostError(f"{what}: {type(error).__name__}: {_first_line(error)}")


def is_lost_process(error: BaseException) -> bool:
    """Whether a worker's error only says that a process, a machine or the connection to it is gone."""
    from ray import exceptions

    if isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.RayTaskError):
        return True
    if isinstance(error, ConnectionError | TimeoutError | InfrastructureError):
        return True
    if _LOST_TYPES & {base.__name__ for base in type(error).__mro__}:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER_TEXTS)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"

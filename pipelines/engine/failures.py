"""Whose fault an error is: the user's (FAILED), the cluster's (RESUMABLE), or nobody's (CANCELLED)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from pipelines.engine.lease import LeaseLostError
from pipelines.engine.runs import Status
from pipelines.errors import UserError
from pipelines.tracking.redact import redact

_CONNECTION_TYPES = {
    "ConnectTimeout",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "EndpointConnectionError",
    "PreemptionError",
    "ReadTimeout",
    "ReadTimeoutError",
}
_CONNECTION_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


@dataclass(frozen=True)
class Failure:
    """How a run ended. `text` is one screen at most; `details` is the traceback, None where it would not help."""

    status: Status
    text: str
    details: str | None


def classify(error: BaseException) -> Failure:
    """Judge an error, or what it wraps: Ray and Ray Train carry the errors of their workers inside their own."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(Status.CANCELLED, "cancelled", None)
    if isinstance(error, SystemExit):
        return Failure(Status.RESUMABLE, "the process was told to end (SIGTERM)", None)
    chain = list(_unwrapped(error, set()))
    for cause in chain:
        if isinstance(cause, _user_errors()):
            return Failure(Status.FAILED, redact(str(cause)), None)
    details = redact("".join(traceback.format_exception(error)))
    for cause in chain:
        if isinstance(cause, LeaseLostError) or _is_clusters_fault(cause):
            return Failure(Status.RESUMABLE, _line(cause), details)
    return Failure(Status.FAILED, _line(chain[-1]), details)


def _user_errors() -> tuple[type[BaseException], ...]:
    from data.errors import DataError

    return (UserError, DataError, ValidationError)


def _unwrapped(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """The error and everything inside it, outermost first."""
    if id(error) in seen:
        return
    seen.add(id(error))
    yield error
    inner = [
        getattr(error, "cause", None),  # ray.exceptions.RayTaskError
        getattr(error, "controller_failure", None),  # ray.train.ControllerError
        *(getattr(error, "worker_failures", None) or {}).values(),  # ray.train.WorkerGroupError
        error.__cause__,
    ]
    for cause in inner:
        if isinstance(cause, BaseException):
            yield from _unwrapped(cause, seen)


def _is_clusters_fault(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in _CONNECTION_TYPES:
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _CONNECTION_TEXTS):
        return True
    exceptions = sys.modules.get("ray.exceptions")  # without Ray there are no errors of Ray
    if exceptions is None or not isinstance(error, exceptions.RayError):
        return False
    return not isinstance(error, exceptions.RayTaskError | exceptions.RuntimeEnvSetupError)


def _line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return str(redact(f"{type(error).__name__}: {text[-2000:]}"))

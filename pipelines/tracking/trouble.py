"""Why points do not get to MLflow, judged where MLflow is called: a refusal for good, an outage, or a disk of ours."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from enum import StrEnum

from pipelines.errors import InfrastructureError, UserError
from pipelines.redact import redact
from pipelines.tracking.target import TrackingTarget

_SHOWN_CHARS = 300
_HTTP_STATUS = re.compile(r"failed with error code (\d{3})")
_NOT_OPENED = (  # of SQLite and of the servers behind SQLAlchemy
    "unable to open database file",
    "file is not a database",
    "readonly database",
    "no such table",
    "out-of-date database schema",
)
_NOT_AN_MLFLOW = ("not in a valid JSON format", "error code 404", "error code 405")
_REFUSING_CODES = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "FEATURE_DISABLED", "ENDPOINT_NOT_FOUND"}


class Cause(StrEnum):
    """Who can do something about it."""

    REFUSED = "refused"  # for good: the user
    AWAY = "away"  # nobody: it passes
    DISK = "disk"  # a file of ours on this machine


@dataclass(frozen=True)
class Trouble:
    """Why a delivery stopped. `text` is a sentence or two with what was found and the remedy, without credentials."""

    cause: Cause
    text: str


class RefusedError(UserError):
    """The store will not take this run's points until the user changes something. The message has the remedy."""


class DiskError(InfrastructureError):
    """A file of ours, not MLflow's, could not be read or written."""


def diagnose(error: BaseException, target: TrackingTarget) -> Trouble:
    """Judge what a delivery raised."""
    where, found = f"MLflow at {target.shown_uri}", brief(error)
    if isinstance(error, RefusedError):
        return Trouble(Cause.REFUSED, str(redact(str(error))))
    if isinstance(error, DiskError):
        return Trouble(Cause.DISK, str(redact(str(error))))
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0] or "needed for MLflow"
        package = {"MySQLdb": "mysqlclient"}.get(package, package)
        return Trouble(
            Cause.REFUSED,
            f"the package {package} is not installed here ({found}), so nothing can be sent to {where}. Install it: "
            f"pip install {package}",
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return Trouble(Cause.DISK, f"{error.filename}: {error.strerror}. Points for {where} are kept.")
    text, code = str(error), getattr(error, "error_code", None)
    status = _status(error)
    if status in (401, 403) or code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"):
        return Trouble(
            Cause.REFUSED,
            f"{where} does not accept the credentials ({found}). Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, and see that they may write to experiment "
            f"{target.experiment!r}.",
        )
    if status in (408, 429) or (status is not None and status >= 500):
        return Trouble(Cause.AWAY, f"{where} does not answer ({found}).")
    if type(error).__name__ == "InvalidUrlException" or any(words in text for words in _NOT_AN_MLFLOW):
        return Trouble(Cause.REFUSED, f"{where} is no MLflow server ({found}). Correct tracking.uri or {_VARIABLE}.")
    if "must be in the 'active' state" in text:
        return Trouble(Cause.REFUSED, deleted_experiment(target, None))
    if any(words in text for words in _NOT_OPENED) or isinstance(error, sqlite3.DatabaseError):
        return Trouble(
            Cause.REFUSED,
            f"the store {target.shown_uri} cannot be opened ({found}). Check that its folder exists and may be "
            f"written, or set tracking.uri or {_VARIABLE} to another store.",
        )
    if code in _REFUSING_CODES:
        return Trouble(Cause.REFUSED, f"{where} refuses this run's points ({found}). See tracking.uri and {_VARIABLE}.")
    return Trouble(Cause.AWAY, f"{where} cannot be reached ({found}).")


_VARIABLE = "MLFLOW_TRACKING_URI"


def deleted_experiment(target: TrackingTarget, experiment_id: str | None) -> str:
    """What to tell of an experiment in MLflow's bin."""
    restore = f"mlflow experiments restore --experiment-id {experiment_id}" if experiment_id else "in MLflow's UI"
    return (
        f"the experiment {target.experiment!r} at {target.shown_uri} was deleted there. Restore it ({restore}), or set "
        "tracking.experiment to another name."
    )


def brief(error: BaseException) -> str:
    """An error in one line of whole words."""
    text = " ".join(str(redact(str(error))).split()) or "no message"
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS].rsplit(" ", 1)[0] + " ..."
    return f"{type(error).__name__}: {text}"


def _status(error: BaseException) -> int | None:
    """The status of the HTTP answer that an error of MLflow's tells of, if it does."""
    found = _HTTP_STATUS.search(str(error))
    return int(found[1]) if found else None

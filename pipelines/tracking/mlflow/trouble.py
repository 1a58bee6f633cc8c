"""What an error of MLflow's client, its stores or its servers means."""

from __future__ import annotations

import re
import sqlite3

from pipelines.tracking.trouble import Cause, Trouble, brief

_VARIABLE = "MLFLOW_TRACKING_URI"
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
_UNACCEPTABLE = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE"}


def is_unacceptable(error: Exception) -> bool:
    """Whether it would fail forever: the event itself is at fault, not the server."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in _UNACCEPTABLE


def explain(error: Exception, where: str, shown_uri: str, experiment: str) -> Trouble | None:
    """Judge an error of MLflow's. None: it tells of nothing but a server out of reach."""
    text, code, found = str(error), getattr(error, "error_code", None), brief(error)
    match = _HTTP_STATUS.search(text)
    status = int(match[1]) if match else 0
    if status in (401, 403) or code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"):
        return Trouble(
            Cause.REFUSED,
            f"{where} does not accept the credentials ({found}). Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, and see that they may write to experiment "
            f"{experiment!r}.",
        )
    if status in (408, 429) or status >= 500:
        return Trouble(Cause.AWAY, f"{where} does not answer ({found}).")
    if type(error).__name__ == "InvalidUrlException" or any(words in text for words in _NOT_AN_MLFLOW):
        return Trouble(Cause.REFUSED, f"{where} is no MLflow server ({found}). Correct tracking.uri or {_VARIABLE}.")
    if "must be in the 'active' state" in text:
        return Trouble(Cause.REFUSED, deleted_experiment(shown_uri, experiment, None))
    if any(words in text for words in _NOT_OPENED) or isinstance(error, sqlite3.DatabaseError):
        return Trouble(Cause.REFUSED, not_opened(shown_uri, error))
    if code in _REFUSING_CODES:
        return Trouble(Cause.REFUSED, f"{where} refuses this run's points ({found}). See tracking.uri and {_VARIABLE}.")
    return None


def not_opened(shown_uri: str, error: Exception) -> str:
    """What to say about a store that is not there or no store."""
    return (
        f"the store {shown_uri} cannot be opened ({brief(error)}). Check that its folder exists and may be written, or "
        f"set tracking.uri or {_VARIABLE} to another store."
    )


def deleted_experiment(shown_uri: str, experiment: str, experiment_id: str | None) -> str:
    """What to say about an experiment in MLflow's bin."""
    restore = f"mlflow experiments restore --experiment-id {experiment_id}" if experiment_id else "in MLflow's UI"
    return (
        f"the experiment {experiment!r} at {shown_uri} was deleted there. Restore it ({restore}), or set "
        "tracking.experiment to another name."
    )

"""Environment variables that keep libraries quiet: nothing phones home, and a dead tracking server is noticed soon."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""For this process and, through Ray's runtime_env, for workers on other machines."""

_MLFLOW_CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the replayer retries by itself, without end
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def quiet_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the above where the user has not, and forget MLFLOW_RUN_ID, which would redirect what is logged.

    Call it before MLflow, Ray or Hugging Face libraries are imported.
    """
    for name, value in {**TELEMETRY_OFF, **_MLFLOW_CLIENT}.items():
        environ.setdefault(name, value)
    environ.pop("MLFLOW_RUN_ID", None)

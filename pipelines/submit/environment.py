"""Variables that go to a job with `--env`: in a file of its package, not in its runtime environment.

Ray shows the runtime environment of a job, with the values of its variables, to everyone who may list jobs, and writes
it into its own logs. The file is readable by the user of Ray's processes alone, and nothing shows it. Every worker of
the job, and its entry point, take the variables from it when they start.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping

from base.errors import UserError
from pipelines.packages import REPOSITORY

FILE = "job-environment.json"  # beside our packages, as they are shipped
HOOK = f"{__name__}.load"

_OFTEN_NEEDED = (
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_APPLICATION_CREDENTIALS"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "HF_TOKEN", "BMOJO_KERNELS"),
)
_MACHINES_OWN = ("PATH", "PYTHONPATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR")


def choose(patterns: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of these names; `AWS_*` is all that begin so.

    Raises: UserError: there is none of a name, or it is the machine's own.
    """
    chosen: dict[str, str] = {}
    for pattern in patterns:
        if pattern in _MACHINES_OWN or pattern.startswith(("RAY_", "*")):
            raise UserError(f"--env {pattern}: is of each machine's own, and is not shipped. Name others.")
        found = fnmatch.filter(sorted(environ), pattern)
        if not found:
            hint = " Give the name alone; its value is taken from here." if "=" in pattern else ""
            raise UserError(
                f"--env {pattern.partition('=')[0]}: no such variable is set here.{hint or ' Set it first.'}"
            )
        chosen |= {name: environ[name] for name in found}
    return chosen


def not_shipped(chosen: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that are set here, would decide where a run writes or how, and stay here."""
    return [name for name in _OFTEN_NEEDED if name in environ and name not in chosen]


def to_file(chosen: Mapping[str, str]) -> bytes:
    """The content of the file."""
    return json.dumps(dict(chosen)).encode()


def load() -> None:
    """Set the variables that were shipped, if any were. Also called by Ray, in each worker of the job."""
    try:
        data = (REPOSITORY / FILE).read_bytes()
    except FileNotFoundError:
        return
    os.environ.update(json.loads(data))

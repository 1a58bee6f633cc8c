"""What an error means for the run: status, exit code, one screen of text (the table is in pipelines.errors)."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Literal

from base.errors import UserError
from pipelines.engine.events import Status
from pipelines.errors import InfrastructureError, LostError, causes
from pipelines.redact import redact

EXIT_USER = 1
EXIT_BUG = 70  # EX_SOFTWARE
EXIT_STOPPED = 3  # by a gate
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: the same command may succeed
EXIT_CANCELLED = 130


@dataclass(frozen=True)
class Failure:
    """How a run or an attempt ended. `text` is one screen at most; `details` is the traceback, None where it would not
    help."""

    status: Literal[Status.FAILED, Status.RESUMABLE, Status.CANCELLED, Status.STOPPED]
    text: str
    details: str | None
    exit_code: int
    may_pass: bool = False  # another attempt may succeed
    is_loss: bool = False  # a process, a machine or a connection was lost: nobody's error


def classify(error: BaseException) -> Failure:
    """Judge an error by the first in its chain of causes that is of ours; where there is none, it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(Status.CANCELLED, "cancelled", None, EXIT_CANCELLED)
    if isinstance(error, SystemExit):
        return Failure(Status.RESUMABLE, "the process was told to end (SIGTERM)", None, EXIT_RESUMABLE)
    chain = list(causes(error))
    details = redact("".join(traceback.format_exception(error)))
    for cause in chain:
        if isinstance(cause, UserError):
            return Failure(Status.FAILED, redact(str(cause)), None, EXIT_USER)
        if isinstance(cause, InfrastructureError):
            return Failure(
                Status.RESUMABLE,
                redact(str(cause)),
                details,
                EXIT_RESUMABLE,
                may_pass=True,
                is_loss=isinstance(cause, LostError),
            )
    return Failure(Status.FAILED, _line(chain[-1]), details, EXIT_BUG, may_pass=True)


def _line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return str(redact(f"{type(error).__name__}: {text[-2000:]}"))

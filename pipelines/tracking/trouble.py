"""Why points do not arrive, judged where a sink is called: a refusal for good, an outage, or a disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.redact import redact

_SHOWN_CHARS = 300
_PACKAGE_OF_MODULE = {"MySQLdb": "mysqlclient"}


class Cause(StrEnum):
    """Who can do something about it."""

    REFUSED = "refused"  # for good: the user
    AWAY = "away"  # nobody: it passes
    DISK = "disk"  # files of ours


@dataclass(frozen=True)
class Trouble:
    """Why a delivery stopped. `text` is a sentence or two with what was found and the remedy, without credentials."""

    cause: Cause
    text: str


def trouble_of(error: Exception, where: str) -> Trouble | None:
    """Judge an error that has the same meaning whatever the sink; None for any other."""
    if isinstance(error, UserError):
        return Trouble(Cause.REFUSED, str(redact(str(error))))
    if isinstance(error, InfrastructureError):
        return Trouble(Cause.DISK, str(redact(str(error))))
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0] or f"needed for {where}"
        package = _PACKAGE_OF_MODULE.get(module, module)
        return Trouble(
            Cause.REFUSED,
            f"the package {package} is not installed here ({brief(error)}), so nothing can be sent to {where}. Install "
            f"it: pip install {package}",
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return Trouble(Cause.DISK, f"{error.filename}: {error.strerror}. Points for {where} are kept.")
    return None


def brief(error: BaseException) -> str:
    """An error in one line of whole words."""
    text = " ".join(str(redact(str(error))).split()) or "no message"
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS].rsplit(" ", 1)[0] + " ..."
    return f"{type(error).__name__}: {text}"

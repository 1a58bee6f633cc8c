"""The three kinds of errors: the user's, the infrastructure's, and bugs.

Errors are classified where they arise: code that calls Ray, a store, MLflow or a parser turns what those raise into one
of the first two (UserError is in base.errors). Anything else that reaches the top is a bug.
pipelines.engine.failures derives status and exit code.

| error               | status    | exit code | the command prints                                            |
|---------------------|-----------|-----------|---------------------------------------------------------------|
| UserError           | FAILED    | 1         | one screen: found, where, expected, next step                 |
| InfrastructureError | RESUMABLE | 75        | one screen: what failed; the same command resumes             |
| anything else       | FAILED    | 70        | one screen, and the file that holds the traceback             |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from base.errors import UserError


class ConfigError(UserError):
    """The pipeline file, a preset or an override is wrong; nothing was started or written."""


class FieldError(ConfigError, ValueError):
    """A field of the configuration is wrong. A ValueError, so that pydantic's validators may raise it.

    Args: field: path from the top of the pipeline file. problem: what was found, what was expected and the next step.
    """

    def __init__(self, field: Sequence[str], problem: str) -> None:
        super().__init__(f"{'.'.join(field)}: {problem}")
        self.field = tuple(field)
        self.problem = problem


class InfrastructureError(Exception):
    """The cluster, the storage, the network or a disk failed. The same command resumes; a script may retry it."""


class LostError(InfrastructureError):
    """A process, a machine or the connection to the cluster was lost; what it did is done again, from where it was."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, the outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__

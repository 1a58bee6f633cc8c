"""Warnings of a stage's work as notices: a line each to whoever watches the run, beside their place in the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

MOST_ALIKE = 5  # notices from one place of the code
LONGEST = 300  # characters
_OURS = ("base", "bmojo", "data", "kernels", "pipelines")


class NoticeLog(Protocol):
    """What takes notices: a Journal, or a worker's end of one."""

    def log_notice(self, text: str) -> None:
        """Tell it, once."""


@contextmanager
def warnings_noted(journal: NoticeLog) -> Iterator[None]:
    """Inside it, the first line of every warning of our packages is a notice, too; the journal tells each text once.

    Of one place in the code five are told: the others are in the log only.
    """
    logging.basicConfig(format="%(message)s")  # to stderr: Python's last resort is not asked where there is a handler
    handler = _Notes(journal)
    for name in _OURS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in _OURS:
            logging.getLogger(name).removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, journal: NoticeLog) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal
        self._told: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out what tracking says of itself, which would never end."""
        return not record.name.startswith("pipelines.tracking")

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it; whatever happens, the log has it."""
        place = record.pathname, record.lineno
        self._told[place] += 1
        if self._told[place] > MOST_ALIKE:
            return
        with suppress(Exception):
            text = record.getMessage().strip().partition("\n")[0]
            if len(text) > LONGEST:
                text = f"{text[:LONGEST].rpartition(' ')[0]} ..."
            more = " (The log has others like it.)" if self._told[place] == MOST_ALIKE else ""
            self._journal.log_notice(f"{text}{more}")

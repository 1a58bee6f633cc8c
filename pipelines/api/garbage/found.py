"""What a search for garbage finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from base.files import Usage
from pipelines.engine.stage import Facts

DAY_S = 24 * 3600.0

What = Literal["artifact", "run", "lease", "unfinished write", "cache", "spool", "Ray Train folder", "Ray session"]


@dataclass(frozen=True)
class Limits:
    """How old things must be, by their newest file."""

    older_than_s: float = DAY_S  # what nothing names, and leftovers
    cache_older_than_s: float = 30 * DAY_S  # cached files that nobody used since
    cache_max_bytes: int | None = None  # in all; those not used for longest go first


class Garbage(Facts):
    """Something that may be thrown away."""

    what: What
    path: str  # or URL
    size_bytes: int
    num_files: int
    age_s: float | None  # since the newest file was written or, in caches, used; None if the store does not tell
    reason: str


class GarbageReport(Facts):
    """What may be deleted, or was."""

    items: tuple[Garbage, ...]
    size_bytes: int
    notes: tuple[str, ...]  # what was left alone, and why
    deleted: bool


@dataclass(frozen=True)
class Thing:
    """Garbage, and how to delete it: `delete` returns why it did not, None if it did."""

    garbage: Garbage
    delete: Callable[[], str | None]


def age_s(usage: Usage) -> float | None:
    """Seconds since the newest file was written."""
    return None if usage.changed_at is None else max(0.0, time.time() - usage.changed_at)


def is_old(usage: Usage, limit_s: float) -> bool:
    """Whether nothing was written for so long, as far as the store tells."""
    age = age_s(usage)
    return age is None or age >= limit_s

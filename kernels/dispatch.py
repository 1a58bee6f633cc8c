"""Which implementation of an operator runs: the one rule.

`torch` (chunked, plain torch) everywhere, unless the environment variable BMOJO_KERNELS or `use(...)` asks for
`reference`, the slow definitions that tests compare with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PATHS = ("reference", "torch")

_forced: ContextVar[str | None] = ContextVar("kernels_path", default=None)


def chosen() -> str:
    """The path in force. Raises: ValueError: BMOJO_KERNELS names no path."""
    return _forced.get() or _checked(os.environ.get("BMOJO_KERNELS", "torch"))


@contextmanager
def use(path: str) -> Iterator[None]:
    """Force a path within a `with` block, for tests."""
    token = _forced.set(_checked(path))
    try:
        yield
    finally:
        _forced.reset(token)


def _checked(path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"kernel path {path!r} does not exist; set BMOJO_KERNELS to one of {', '.join(PATHS)}.")
    return path

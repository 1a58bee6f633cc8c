"""Work beside other work: a thread that lives as long as a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(work: Callable[[threading.Event], object], name: str, end_s: float | None = None) -> Iterator[None]:
    """Run `work` in a thread while the block runs.

    Args:
        work: is given an event that is set when the block has ended; then it should return soon.
        name: of the thread, for whoever reads stacks.
        end_s: seconds that the end of the block waits for it; None: as long as it takes.
    """
    is_over = threading.Event()
    thread = threading.Thread(target=work, args=(is_over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(end_s)

"""Lets other threads stop the main thread's work, as Ctrl-C does, and turns SIGTERM into an orderly end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_WAKE = signal.SIGUSR1


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function for other threads that raises KeyboardInterrupt in this one, even while it waits.

    SIGTERM raises SystemExit meanwhile. Outside the main thread, where Python handles no signals, the function does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    main = threading.main_thread().ident
    assert main is not None
    before = {number: signal.getsignal(number) for number in (_WAKE, signal.SIGTERM)}
    signal.signal(_WAKE, _raise_interrupt)
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        yield lambda: signal.pthread_kill(main, _WAKE)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _raise_exit(*_: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)

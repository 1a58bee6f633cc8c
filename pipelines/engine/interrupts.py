"""Signals: SIGTERM and Ctrl-C end the work in order and soon, and other threads can stop the main one.

The first signal raises in the main thread: Terminated (exit code 75, the run is RESUMABLE) or KeyboardInterrupt (130,
CANCELLED). What unwinds then may wait for a cluster or a server; GRACE_S later the process ends all the same, which is
safe because a run whose driver is gone is RESUMABLE. A second signal ends it at once, but for one that comes within
SAME_S: whoever stops a job often signals a process and its parent, which passes the signal on. Schedulers that stop a
process grant it about 30 s.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

EXIT_TERMINATED = 75  # EX_TEMPFAIL: the same command resumes
EXIT_INTERRUPTED = 130
GRACE_S = 20.0
SAME_S = 1.0
_WAKE = signal.SIGUSR1
_OURS = (_WAKE, signal.SIGTERM, signal.SIGINT)

_ending: list[Ending] = []  # of the first signal, once one has come


class Ending(NamedTuple):
    """How this process ends, and since when it does."""

    code: int
    since: float


class Terminated(SystemExit):
    """SIGTERM came."""


def handle_signals() -> None:
    """Take over SIGTERM and SIGINT for the whole process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_terminate)
        signal.signal(signal.SIGINT, _on_interrupt)


def leave_on_signals() -> None:
    """Until handle_signals: end at once. For the entry point, before it imports more: nothing has started by then."""
    signal.signal(signal.SIGTERM, lambda *_: _leave(EXIT_TERMINATED))
    signal.signal(signal.SIGINT, lambda *_: _leave(EXIT_INTERRUPTED))


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function for other threads that raises KeyboardInterrupt in this one, even while it waits.

    SIGTERM raises Terminated meanwhile. Outside the main thread, where Python handles no signals, the function does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    main = threading.main_thread().ident
    assert main is not None
    with kept_handlers():
        signal.signal(_WAKE, _raise_interrupt)
        if signal.getsignal(signal.SIGTERM) is not _on_terminate:  # used as a library
            signal.signal(signal.SIGTERM, _raise_terminated)
        yield lambda: signal.pthread_kill(main, _WAKE)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Put our signal handlers back afterwards: libraries replace them and leave their own behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _OURS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_ending() -> bool:
    """Whether a signal has told this process to end."""
    return bool(_ending)


def exit_after_signal() -> None:
    """Where a signal ended the work: stop Ray and leave, without what libraries do (and may abort in) at exit."""
    if _ending:
        stop_ray_and_leave(_ending[0].code)


def stop_ray_and_leave(code: int) -> NoReturn:
    """End without what libraries do at exit, which may hang or abort; but let Ray end this process's work."""
    _flush()  # before what may hang until somebody kills this process
    shutdown: Callable[[], None] | None = getattr(sys.modules.get("ray"), "shutdown", None)
    if shutdown is not None:
        with suppress(BaseException):  # what a signal raises too: this process ends all the same
            shutdown()
    _leave(code)


def _on_terminate(*_: Any) -> None:
    if _is_first(EXIT_TERMINATED):
        raise Terminated(EXIT_TERMINATED)


def _on_interrupt(*_: Any) -> None:
    if _is_first(EXIT_INTERRUPTED):
        raise KeyboardInterrupt


def _is_first(code: int) -> bool:
    """Whether no signal came before; then the grace begins. A second one ends the process."""
    if _ending:
        if time.monotonic() - _ending[0].since > SAME_S:
            _leave(code)
        return False
    _ending.append(Ending(code, time.monotonic()))
    timer = threading.Timer(GRACE_S, _leave, (code,))
    timer.daemon = True
    timer.start()
    return True


def _leave(code: int) -> NoReturn:
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed before Python started
        # Nobody reads it or the disk is full; it is closed; or the signal came in the middle of a write to it.
        with suppress(OSError, ValueError, RuntimeError):
            stream.flush()


def _raise_interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _raise_terminated(*_: Any) -> NoReturn:
    raise Terminated(EXIT_TERMINATED)

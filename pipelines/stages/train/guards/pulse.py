"""Signs of life of a worker: how far the thread that trains is, told by a thread of its own (docs/design/0028).

A process trains at most once, so how far it is belongs to the process: `beat` is called wherever something is done,
and needs nothing passed on.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from base.threads import beside

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[4]  # our source
_LONGEST_PERIOD_S = 5.0
_END_S = 5.0
_PATIENT_S = 1.0


class Beat(NamedTuple):
    """The last thing that the training thread began. `at`: monotonic seconds."""

    at: float
    step: int
    doing: str


class Sign(NamedTuple):
    """What a worker tells of itself.

    Attributes:
        step: that is under way, from 1; 0: none yet.
        doing: since the last beat, in words.
        age_s: seconds since that beat.
        line: of our source that the training thread is in, and where that leads to.
    """

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    age_s: float
    line: str


class Listener(Protocol):
    """Where signs of life go."""

    def tell(self, sign: Sign) -> bool:
        """Take a sign. Returns whether the stacks of all threads are wanted."""

    def tell_stacks(self, rank: int, text: str) -> None:
        """Take the stacks of a worker's threads."""


def period_s(hang_after_s: float) -> float:
    """Seconds between two signs of life of a worker."""
    return min(_LONGEST_PERIOD_S, hang_after_s / 10)


_last = Beat(time.monotonic(), 0, "starts")


def beat(doing: str, step: int | None = None) -> None:
    """Note in the training thread that something begins; costs less than a microsecond.

    Args: doing: what, in words. step: the step that begins; None: still the same.
    """
    global _last  # one training per process
    _last = Beat(time.monotonic(), _last.step if step is None else step, doing)


@contextmanager
def patiently(doing: str) -> Iterator[None]:
    """Beat while the block runs: around one wait for a disk or a store, which may take as long as it takes."""
    beat(doing)

    def go_on(is_over: threading.Event) -> None:
        while not is_over.wait(_PATIENT_S):
            beat(doing)

    with beside(go_on, "patience"):
        yield


@contextmanager
def signs_of_life(listener: Listener, rank: int, every_s: float) -> Iterator[None]:
    """Tell the listener every `every_s` seconds how far the calling thread is, from another thread."""
    training_thread = threading.get_ident()
    beat("starts", step=0)

    def tell(is_over: threading.Event) -> None:
        has_told_stacks = False
        while True:
            try:
                wants_stacks = listener.tell(_sign(rank, training_thread))
                if wants_stacks and not has_told_stacks:
                    listener.tell_stacks(rank, all_stacks(training_thread))
                    has_told_stacks = True
            except Exception as error:  # the listener may be gone, and training is not: it is told again
                logger.debug("No sign of life was taken: %s", error)
            if is_over.wait(every_s):
                return

    with beside(tell, "signs of life", _END_S):
        yield


def all_stacks(training_thread: int) -> str:
    """The Python stacks of all threads of this process, that of the training thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != training_thread)
    parts = []
    for ident, frame in frames:
        role = ", which trains" if ident == training_thread else ""
        parts.append(f"thread {names.get(ident, ident)!r}{role}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def _sign(rank: int, training_thread: int) -> Sign:
    last = _last
    frame = sys._current_frames().get(training_thread)
    return Sign(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        step=last.step,
        doing=last.doing,
        age_s=time.monotonic() - last.at,
        line=_place(frame) if frame is not None else "its training thread has ended",
    )


def _place(frame: FrameType) -> str:
    """The innermost line of our source in a stack, and the function at its very end where that is another one."""
    innermost = frame.f_code.co_name
    at: FrameType | None = frame
    while at is not None and not _is_ours(at):
        at = at.f_back
    if at is None:
        return f"{frame.f_code.co_filename}:{frame.f_lineno} in {innermost}"
    name = Path(at.f_code.co_filename).relative_to(_ROOT)
    leads_to = f", in {innermost}()" if at is not frame else ""
    return f"{name}:{at.f_lineno} ({at.f_code.co_name}){leads_to}"


def _is_ours(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(_ROOT) and "site-packages" not in path.parts

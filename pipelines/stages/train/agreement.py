"""How all workers save, or stop, at the same step: what one was asked, all must know before any saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

import torch
import torch.distributed as dist

from pipelines.errors import LostError
from pipelines.tracking.request import Request

_EVERY_S = 1.0
_MOST_STEPS = 1000
_NOTICE_EVERY = 5  # agreements between two looks for a notice, which ask every worker


class Wish(IntEnum):
    """What training must do before its next step."""

    NONE = 0
    SAVE = 1
    STOP = 2  # it was asked to
    LEAVE = 3  # a machine of a worker will be taken away soon
    GROW = 4  # there is room for more workers

    @property
    def reason(self) -> str:
        """Why training ends, for wishes that end it."""
        return {
            Wish.STOP: "it was asked to",
            Wish.LEAVE: "a machine will be taken away",
            Wish.GROW: "more workers will go on",
        }[self]


class LeftToGrow(LostError):  # noqa: N818 - nothing went wrong
    """The workers have saved and left, so that more of them can go on."""


_WISHES = {Request.STOP: Wish.STOP, Request.GROW: Wish.GROW}


class Agreement:
    """Asks rank 0 about once per second, and tells every rank at the same step.

    The ranks agree on the number of steps until they ask again, so that it costs nothing between.
    """

    def __init__(
        self,
        request: Callable[[], Request],
        is_save_due: Callable[[], bool],
        is_preempted: Callable[[], bool] | None,
        device: torch.device,
    ) -> None:
        """The first two are called on rank 0 only; `is_preempted` is a collective with one answer for all."""
        self._request, self._is_save_due = request, is_save_due
        self._is_preempted, self._device = is_preempted, device
        self._steps_left = 1
        self._steps, self._asked_at, self._agreements = 1, time.monotonic(), 0

    def reached(self) -> Wish:
        """What to do now. A collective: every rank calls it after every step."""
        self._steps_left -= 1
        if self._steps_left:
            return Wish.NONE
        self._agreements += 1
        if self._is_preempted is not None and self._agreements % _NOTICE_EVERY == 0 and self._is_preempted():
            return Wish.LEAVE
        wish, interval = Wish.NONE, 0
        if dist.get_rank() == 0:
            now = time.monotonic()
            step_s = (now - self._asked_at) / self._steps
            self._asked_at = now
            wish = _WISHES.get(self._request(), Wish.SAVE if self._is_save_due() else Wish.NONE)
            interval = max(1, min(_MOST_STEPS, int(_EVERY_S / max(step_s, 1e-6))))
        agreed = torch.tensor([wish, interval], dtype=torch.int64, device=self._device)
        dist.broadcast(agreed, src=0)
        value, interval = agreed.tolist()
        self._steps_left = self._steps = interval
        return Wish(value)

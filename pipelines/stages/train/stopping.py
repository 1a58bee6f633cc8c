"""How all workers stop at the same step: what one was asked, all must know before any saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

import torch
import torch.distributed as dist

_EVERY_S = 1.0
_MOST_STEPS = 1000
_NOTICE_EVERY = 5  # agreements between two looks for a notice, which ask every worker


class StopReason(IntEnum):
    """Why training ends before its last step."""

    NONE = 0
    ASKED = 1
    PREEMPTED = 2  # a machine of a worker will be taken away soon


class StopAgreement:
    """Asks rank 0 about once per second, and tells every rank at the same step.

    The ranks agree on the number of steps until they ask again, so that it costs nothing between.
    """

    def __init__(
        self, was_asked: Callable[[], bool], is_preempted: Callable[[], bool] | None, device: torch.device
    ) -> None:
        """`was_asked` is called on rank 0 only; `is_preempted` is a collective with one answer for all."""
        self._was_asked, self._is_preempted, self._device = was_asked, is_preempted, device
        self._steps_left = 1
        self._steps, self._asked_at, self._agreements = 1, time.monotonic(), 0

    def reached(self) -> StopReason:
        """Whether to stop now, and why. A collective: every rank calls it after every step."""
        self._steps_left -= 1
        if self._steps_left:
            return StopReason.NONE
        self._agreements += 1
        if self._is_preempted is not None and self._agreements % _NOTICE_EVERY == 0 and self._is_preempted():
            return StopReason.PREEMPTED
        stop, interval = 0, 0
        if dist.get_rank() == 0:
            now = time.monotonic()
            step_s = (now - self._asked_at) / self._steps
            self._asked_at = now
            stop, interval = int(self._was_asked()), max(1, min(_MOST_STEPS, int(_EVERY_S / max(step_s, 1e-6))))
        agreed = torch.tensor([stop, interval], dtype=torch.int64, device=self._device)
        dist.broadcast(agreed, src=0)
        stop, interval = (int(value) for value in agreed.tolist())
        self._steps_left = self._steps = interval
        return StopReason.ASKED if stop else StopReason.NONE

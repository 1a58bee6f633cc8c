"""Text of tokens as they come: whole characters, cut at the first stop."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Bytes in, text out. What may yet turn out to be the beginning of a stop is held back.

    The stop that counts is the one that is complete first; of several complete at once, the longest. Bytes that do not
    form UTF-8 appear as the replacement character.

    Attributes:
        num_chars: characters so far, those held back included; after a stop, those before it.
        num_shown: characters handed out so far.
        is_stopped: whether a stop came. Nothing may follow.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        self._held = ""
        self.num_shown = 0
        self.is_stopped = False

    @property
    def num_chars(self) -> int:
        return self.num_shown + len(self._held)

    def push(self, data: bytes) -> str:
        """Text that can be shown now."""
        return self._add(self._decoder.decode(data))

    def close(self) -> str:
        """What was held back, if no stop came."""
        shown = self._add(self._decoder.decode(b"", final=True))
        return shown if self.is_stopped else shown + self._show(len(self._held))

    def _add(self, text: str) -> str:
        if self.is_stopped:
            return ""
        before, self._held = len(self._held), self._held + text
        for end in range(before + 1, len(self._held) + 1):
            done = [stop for stop in self._stops if self._held[:end].endswith(stop)]
            if done:
                self._held = self._held[: end - max(map(len, done))]
                self.is_stopped = True
                return self._show(len(self._held))
        return self._show(len(self._held) - self._num_begun())

    def _num_begun(self) -> int:
        """Length of the longest end of the text that begins a stop."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _show(self, num_chars: int) -> str:
        shown, self._held = self._held[:num_chars], self._held[num_chars:]
        self.num_shown += len(shown)
        return shown

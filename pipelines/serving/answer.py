"""One answer as it is drawn: tokens become text, until something ends it."""

from __future__ import annotations

import torch

from data.tokenizer import Tokenizer
from pipelines.serving.job import Answered, Drawing, DrawnToken
from pipelines.serving.scores import TokenScore
from pipelines.serving.text import TextStream


class Answer:
    """Attributes:
    reason: why it ended, as the API says it; None: it has not.
    num_tokens: drawn so far, without the end of the document.
    """

    def __init__(self, choice: int, drawing: Drawing, tokenizer: Tokenizer, device: torch.device) -> None:
        self.choice, self.drawing = choice, drawing
        self.rng = torch.Generator(device).manual_seed((drawing.seed + choice) % 2**63)
        self.reason: str | None = None if drawing.max_tokens else "length"
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._text = TextStream(drawing.stops)
        self._read: list[DrawnToken] = []
        self._num_out = 0
        self._shown: list[str] = []
        self._cut: int | None = None  # characters before the stop that ended it

    def add(self, token: int, score: TokenScore | None) -> Answered:
        """Take the token that was drawn. Returns what there is to tell."""
        if token == self._tokenizer.eod_id and not self.drawing.ignores_end:
            return self.end("stop")
        self._read.append(DrawnToken(token, self._text.num_chars, score))
        self.num_tokens += 1
        text = self._text.push(self._tokenizer.decode([token]))
        if self._text.is_stopped:
            self.reason, self._cut = "stop", self._text.num_chars
            return self._answered(text)
        if self.num_tokens == self.drawing.max_tokens:
            told = self._answered(text)
            rest = self.end("length")
            return Answered(self.choice, told.text + rest.text, told.tokens + rest.tokens)
        return self._answered(text)

    def end(self, reason: str) -> Answered:
        """End it. What was held back comes out."""
        self.reason = reason
        text = self._text.close()
        if self._text.is_stopped:  # by a character that was cut off
            self.reason, self._cut = "stop", self._text.num_chars
        return self._answered(text)

    def tokens_of_text(self) -> list[int]:
        """Ids that stand for the answer, without the stop that ended it or the end of the document."""
        if self._cut is None:
            return [token.id for token in self._read]
        starts = [token.start for token in self._read]
        ends = [*starts[1:], self._cut + 1]  # the last one ends past the cut
        whole = sum(end <= self._cut for end in ends)
        while whole and starts[whole - 1] == ends[whole - 1]:  # the first bytes of a character
            whole -= 1
        rest = "".join(self._shown)[starts[whole] :]
        return [token.id for token in self._read[:whole]] + self._tokenizer.encode_batch([rest])[0].tolist()

    def _answered(self, text: str) -> Answered:
        """With the tokens whose text is out; at the end, with all that begin before it ends."""
        self._shown.append(text)
        waiting = self._read[self._num_out :]
        starts = [token.start for token in waiting]
        if self.reason is None:
            ends = [*starts[1:], self._text.num_chars]
            out = [n + 1 for n, start in enumerate(starts) if start < ends[n] <= self._text.num_shown]
            num_new = out[-1] if out else 0  # the first bytes of a character come with the last
        else:
            num_new = sum(self._cut is None or start < self._cut for start in starts)
        self._num_out += num_new
        return Answered(self.choice, text, tuple(waiting[:num_new]))

"""How answers look in the two kinds of responses."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.tokenizer import Tokenizer
from pipelines.serving.job import DrawnToken
from pipelines.serving.protocol import ChatRequest, CompletionRequest
from pipelines.serving.scores import TokenScore

Body = dict[str, Any]


@dataclass(frozen=True)
class Echo:
    """A prompt as an echo shows it: its tokens but those that stand for no text, with their scores."""

    text: str
    tokens: list[DrawnToken]


@dataclass
class Choice:
    """An answer, or what it grew by. echo: what is shown before it. num_before: characters of the echo, in any part."""

    index: int
    text: str = ""
    tokens: list[DrawnToken] = field(default_factory=list)
    reason: str | None = None
    echo: Echo | None = None
    num_before: int = 0


class Shape(ABC):
    """Of the responses to one request."""

    name: str
    chunk_name: str  # of a part of a streamed response
    id_prefix: str

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, index: int) -> Body | None:
        """The choice of a first chunk, if there is one before any text."""
        return None

    @abstractmethod
    def whole(self, choice: Choice) -> Body:
        """A choice of a response."""

    @abstractmethod
    def part(self, choice: Choice) -> Body:
        """A choice of a chunk."""

    def named(self, token: int) -> str:
        """A token as text; bytes that are no whole characters as OpenAI shows them."""
        if token == self._tokenizer.eod_id:
            return self._tokenizer.end_of_document
        data = self._tokenizer.decode([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionShape(Shape):
    """See https://platform.openai.com/docs/api-reference/completions."""

    name = chunk_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        super().__init__(tokenizer)
        self._request = request

    def whole(self, choice: Choice) -> Body:
        echo = choice.echo
        body: Body = {
            "index": choice.index,
            "text": choice.text if echo is None else echo.text + choice.text,
            "logprobs": self._logprobs(choice) if self._request.logprobs is not None else None,
            "finish_reason": choice.reason,
        }
        if self._request.return_token_ids:
            body["token_ids"] = [token.id for token in choice.tokens]
        return body

    def part(self, choice: Choice) -> Body:
        return self.whole(choice)

    def _logprobs(self, choice: Choice) -> Body:
        echoed = [] if choice.echo is None else [(token.start, token) for token in choice.echo.tokens]
        tokens = echoed + [(choice.num_before + token.start, token) for token in choice.tokens]
        return {
            "tokens": [self.named(token.id) for _, token in tokens],
            "token_logprobs": [None if token.score is None else token.score.logprob for _, token in tokens],
            "top_logprobs": [None if token.score is None else self._top(token.id, token.score) for _, token in tokens],
            "text_offset": [offset for offset, _ in tokens],
        }

    def _top(self, token: int, score: TokenScore) -> dict[str, float]:
        return {**{self.named(other): value for other, value in score.top}, self.named(token): score.logprob}


class ChatShape(Shape):
    """See https://platform.openai.com/docs/api-reference/chat."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, request: ChatRequest) -> None:
        super().__init__(tokenizer)
        self._request = request

    def opening(self, index: int) -> Body:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, choice: Choice) -> Body:
        return self._body(choice, "message", {"role": "assistant", "content": choice.text, "refusal": None})

    def part(self, choice: Choice) -> Body:
        return self._body(choice, "delta", {"content": choice.text} if choice.text else {})

    def _body(self, choice: Choice, name: str, content: Body) -> Body:
        body: Body = {
            "index": choice.index,
            name: content,
            "logprobs": {"content": [self._scored(token) for token in choice.tokens]}
            if self._request.logprobs
            else None,
            "finish_reason": choice.reason,
        }
        if self._request.return_token_ids:
            body["token_ids"] = [token.id for token in choice.tokens]
        return body

    def _scored(self, token: DrawnToken) -> Body:
        score = token.score
        top = [] if score is None else score.top
        return {
            **self._named_bytes(token.id, None if score is None else score.logprob),
            "top_logprobs": [self._named_bytes(other, value) for other, value in top],
        }

    def _named_bytes(self, token: int, logprob: float | None) -> Body:
        return {"token": self.named(token), "logprob": logprob, "bytes": list(self._tokenizer.decode([token]))}


def with_offsets(tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenScore | None]) -> Echo:
    """Tokens with the text that they stand for."""
    decoder, text, tokens = codecs.getincrementaldecoder("utf-8")("replace"), [], []
    num_chars = 0
    for index, score in zip(ids, scores, strict=True):
        tokens.append(DrawnToken(index, num_chars, score))
        text.append(decoder.decode(tokenizer.decode([index])))
        num_chars += len(text[-1])
    return Echo("".join(text) + decoder.decode(b"", final=True), tokens)

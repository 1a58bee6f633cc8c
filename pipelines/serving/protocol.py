"""Requests and responses as in OpenAI's API, checked: what is not understood is an error that says so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from base.names import suggest
from bmojo.generation import MAX_SEED

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16

_EXPECTED = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text, or a list of them, of 1 to 1,000 characters each",
    "state": "the id of a state: 1 to 64 letters, digits, dots, dashes and underscores, first a letter or a digit",
    "save_state": "an id: 1 to 64 letters, digits, dots, dashes and underscores, first a letter or a digit",
}
"""Fields whose errors are said in our words; pydantic names a type of a union, or a regular expression."""

StateId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", strict=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1000, strict=True)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
Whole = Annotated[int, Field(strict=True)]


class ApiError(Exception):
    """An error as the API tells it. status: of HTTP. kind, param, code: as OpenAI's type, param and code."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class DrawingFields(BaseModel):
    """What both kinds of request say about drawing and states.

    frequency_penalty, presence_penalty, logit_bias: only with values that change nothing, which some clients send.
    user: not used.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=1)
    n: Whole = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stop | list[Stop] | None = None
    seed: Whole | None = Field(None, ge=0, le=MAX_SEED)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    state: StateId | None = None
    save_state: StateId | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    user: str | None = None

    @model_validator(mode="after")
    def _check_drawing(self) -> DrawingFields:
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop has {len(self.stop)} texts; at most {MAX_STOPS} are looked for")
        if self.save_state is not None and self.n != 1:
            raise ValueError(f"save_state needs n=1, not {self.n}: a state is after one answer")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(DrawingFields):
    """POST /v1/completions.

    prompt: text begins a document, unless it continues a state; token ids are read as they are.
    """

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = ""
    max_tokens: Whole = Field(16, ge=0)
    echo: bool = False
    logprobs: Whole | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Whole | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} is not supported, other than n={self.n}")
        if self.prompt == [] or (isinstance(self.prompt, list) and [] in self.prompt):
            raise ValueError("prompt is empty: give text or token ids")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts times n={self.n} are over {MAX_CHOICES} answers")
        if self.save_state is not None and len(self.prompts) != 1:
            raise ValueError(f"save_state needs one prompt, not {len(self.prompts)}")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class ChatRequest(DrawingFields):
    """POST /v1/chat/completions: the messages as one text (pipelines.serving.template)."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_messages(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's: the model answers it")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


def parse(kind: type[DrawingFields], body: Any) -> Any:
    """A request of a kind. Raises: ApiError: what is wrong, and where."""
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    unknown = sorted(set(body) - set(kind.model_fields))
    if unknown:
        raise ApiError(
            400, f"Unknown field {unknown[0]!r}.{suggest(unknown[0], list(kind.model_fields))}", param=unknown[0],
            code="unknown_parameter",
        )  # fmt: skip
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if param in _EXPECTED:
            raise ApiError(400, f"{param}: expected {_EXPECTED[param]}.", param=param) from error
        where = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {problem}." if where else f"{problem}.", param=param) from error

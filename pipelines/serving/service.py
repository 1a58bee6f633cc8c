"""Requests become jobs of the engine, and what it tells becomes responses. Nothing here knows of HTTP."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial

from base.errors import DamagedError
from bmojo.generation import MAX_SEED
from data.errors import DataError
from data.tokenizer import Tokenizer
from pipelines.serving import template
from pipelines.serving.context import Context
from pipelines.serving.engine import Engine, QueueFullError
from pipelines.serving.job import Answered, Done, Drawing, Event, Failed, Finished, Job, PromptRead
from pipelines.serving.metrics import Metrics
from pipelines.serving.protocol import ApiError, ChatRequest, CompletionRequest, DrawingFields
from pipelines.serving.shapes import Body, ChatShape, Choice, CompletionShape, Echo, Shape, with_offsets
from pipelines.serving.states import NoSuchStateError, StateError, StateExistsError, StateFacts, StateStore

DEFAULT_CHAT_TOKENS = 512


@dataclass(frozen=True)
class _Prompt:
    """What is read before an answer. num_hidden: tokens at its beginning that are no part of what was given."""

    tokens: list[int]
    num_hidden: int


@dataclass(frozen=True)
class _Asked:
    """A request, understood."""

    fields: DrawingFields
    prompts: list[str | list[int]]
    drawing: Drawing
    shape: Shape
    echoes: bool = False


class Answering:
    """One request under way.

    Events come in the order in which they happen, of all prompts. `close` gives the rows back, also half-way.
    """

    def __init__(self, service: Service, asked: _Asked, prompts: list[_Prompt], start: Context | None) -> None:
        self._service, self._asked, self._prompts = service, asked, prompts
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._id = f"{asked.shape.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_drawn = 0
        self._context: Context | None = None
        self._saved: StateFacts | None = None
        self._begun = time.perf_counter()
        loop, n = asyncio.get_running_loop(), asked.fields.n
        self.jobs = [
            Job(
                prompt.tokens,
                replace(asked.drawing, seed=(asked.drawing.seed + number * n) % (MAX_SEED + 1)),
                tell=partial(_tell, loop, self._events, number),
                start=start,
                num_choices=n,
                scores_prompt=asked.echoes and asked.drawing.num_logprobs is not None,
                keeps_context=asked.fields.save_state is not None,
            )
            for number, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """Nobody waits for the rest."""
        for job in self.jobs:
            job.cancel()

    async def whole(self) -> Body:
        """The response, once it is complete. Raises: ApiError."""
        choices: dict[int, Choice] = {}
        async for part in self._parts():
            choice = choices.setdefault(part.index, Choice(part.index, num_before=part.num_before))
            choice.text += part.text
            choice.tokens += part.tokens
            choice.reason, choice.echo = part.reason or choice.reason, part.echo or choice.echo
        shape = self._asked.shape
        body = self._body(shape.name, [shape.whole(choices[index]) for index in sorted(choices)])
        body["usage"] = self._usage()
        return {**body, **self._saved_state()}

    async def stream(self) -> AsyncIterator[Body]:
        """The chunks of a streamed response. Raises: ApiError."""
        shape, options = self._asked.shape, self._asked.fields.stream_options
        for index in range(len(self._prompts) * self._asked.fields.n):
            opening = shape.opening(index)
            if opening is not None:
                yield self._body(shape.chunk_name, [opening])
        async for part in self._parts():
            yield self._body(shape.chunk_name, [shape.part(part)])
        has_usage = options is not None and options.include_usage
        if has_usage or self._saved is not None:
            usage = {"usage": self._usage()} if has_usage else {}
            yield {**self._body(shape.chunk_name, []), **usage, **self._saved_state()}

    async def _parts(self) -> AsyncIterator[Choice]:
        """What the answers grow by; at the end the state is on the disk, if it is to be saved."""
        num_open, n, is_first = len(self.jobs), self._asked.fields.n, True
        echoes = [Echo("", []) for _ in self.jobs]
        while num_open:
            number, event = await self._events.get()
            before = len(echoes[number].text)
            match event:
                case PromptRead():
                    if self._asked.echoes:
                        echoes[number] = self._echo(self._prompts[number], event)
                        for choice in range(n):
                            echo = echoes[number]
                            yield Choice(number * n + choice, echo=echo, num_before=len(echo.text))
                case Answered():
                    if is_first and event.text:
                        is_first = False
                        self._service.metrics.first_token_s.observe(time.perf_counter() - self._begun)
                    yield Choice(number * n + event.choice, event.text, [*event.tokens], num_before=before)
                case Finished():
                    self._num_drawn += event.num_tokens
                    yield Choice(number * n + event.choice, reason=event.reason, num_before=before)
                case Done():
                    num_open -= 1
                    self._context = event.context
                case Failed():
                    raise ApiError(500, f"The request failed: {event.error}", kind="server_error")
        if self._asked.fields.save_state is not None and self._context is not None:
            self._saved = await self._service.save(self._asked.fields.save_state, self._context)

    def _echo(self, prompt: _Prompt, event: PromptRead) -> Echo:
        scores = event.scores or [None] * len(prompt.tokens)
        return with_offsets(self._service.tokenizer, prompt.tokens[prompt.num_hidden :], scores[prompt.num_hidden :])

    def _body(self, name: str, choices: list[Body]) -> Body:
        return {
            "id": self._id, "object": name, "created": self._created, "model": self._service.model_id,
            "choices": choices,
        }  # fmt: skip

    def _usage(self) -> Body:
        num_read = sum(len(prompt.tokens) for prompt in self._prompts)
        return {
            "prompt_tokens": num_read, "completion_tokens": self._num_drawn,
            "total_tokens": num_read + self._num_drawn,
        }  # fmt: skip

    def _saved_state(self) -> Body:
        return {} if self._saved is None else {"saved_state": state_body(self._saved)}


class Service:
    """What a server does.

    Args: max_tokens: that one answer may have, at most.
    """

    def __init__(
        self, model_id: str, engine: Engine, tokenizer: Tokenizer, store: StateStore, metrics: Metrics, max_tokens: int
    ) -> None:
        self.model_id, self.engine, self.tokenizer, self.store, self.metrics = (
            model_id, engine, tokenizer, store, metrics,
        )  # fmt: skip
        self.created = int(time.time())
        self._max_tokens = max_tokens

    async def complete(self, request: CompletionRequest) -> Answering:
        """Begin to answer. Raises: ApiError."""
        drawing = self._drawing(request, request.max_tokens, request.stops, request.logprobs)
        shape = CompletionShape(self.tokenizer, request)
        return await self._begin(_Asked(request, request.prompts, drawing, shape, request.echo))

    async def chat(self, request: ChatRequest) -> Answering:
        """Begin to answer. Raises: ApiError."""
        wanted = request.max_completion_tokens or request.max_tokens
        num_tokens = wanted or min(DEFAULT_CHAT_TOKENS, self._max_tokens)
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        drawing = self._drawing(request, num_tokens, (*template.STOPS, *request.stops), num_logprobs)
        messages = [(message.role, message.content) for message in request.messages]
        text = template.as_text(messages, continues=request.state is not None)
        return await self._begin(_Asked(request, [text], drawing, ChatShape(self.tokenizer, request)))

    async def save(self, state_id: str, context: Context) -> StateFacts:
        """Keep a context. Raises: ApiError."""
        try:
            return await asyncio.to_thread(self.store.save, state_id, context)
        except (StateError, OSError) as error:
            raise state_error(error, "save_state") from error

    async def _begin(self, asked: _Asked) -> Answering:
        self._check_model(asked.fields.model)
        start = await self._start(asked.fields)
        prompts = await asyncio.to_thread(self._read_prompts, asked.prompts, start is None)
        self._check_room(prompts, start, asked.drawing.max_tokens)
        answering = Answering(self, asked, prompts, start)
        try:
            self.engine.submit(answering.jobs)
        except QueueFullError as error:
            raise ApiError(
                429, f"Too many requests: {error}. Try again later.", kind="rate_limit_error", code="queue_full"
            ) from error
        return answering

    async def _start(self, fields: DrawingFields) -> Context | None:
        try:
            if fields.save_state is not None:
                await asyncio.to_thread(self.store.check_free, fields.save_state)
        except StateError as error:
            raise state_error(error, "save_state") from error
        if fields.state is None:
            return None
        try:
            return await asyncio.to_thread(self.store.load, fields.state)
        except (StateError, DamagedError) as error:
            raise state_error(error, "state") from error

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.model_id:
            raise ApiError(
                404, f"There is no model {model!r} here; there is {self.model_id!r}.", param="model",
                code="model_not_found",
            )  # fmt: skip

    def _drawing(
        self, fields: DrawingFields, max_tokens: int, stops: tuple[str, ...], num_logprobs: int | None
    ) -> Drawing:
        if max_tokens > self._max_tokens:
            raise ApiError(
                400, f"max_tokens is {max_tokens}; this server draws at most {self._max_tokens} for one answer.",
                param="max_tokens",
            )  # fmt: skip
        top_p = None if fields.top_p == 1 else fields.top_p
        seed = secrets.randbelow(MAX_SEED) if fields.seed is None else fields.seed
        return Drawing(
            max_tokens, fields.temperature, fields.top_k, top_p, seed, stops, fields.ignore_eos, num_logprobs
        )

    def _read_prompts(self, prompts: list[str | list[int]], is_beginning: bool) -> list[_Prompt]:
        """Text that begins a document comes after the end-of-document token, as in training."""
        read = []
        for prompt in prompts:
            if isinstance(prompt, list):
                self._check_ids(prompt)
                read.append(_Prompt(prompt, 0))
                continue
            try:
                ids = self.tokenizer.encode_batch([prompt])[0].tolist()
            except (UnicodeEncodeError, DataError) as error:
                raise ApiError(400, f"The prompt cannot be encoded: {error}.", param="prompt") from error
            hidden = self.tokenizer.start_ids if is_beginning else ()
            read.append(_Prompt([*hidden, *ids], len(hidden)))
        return read

    def _check_ids(self, ids: list[int]) -> None:
        wrong = next((token for token in ids if token >= self.tokenizer.vocab_size), None)
        if wrong is not None:
            raise ApiError(
                400, f"There is no token {wrong}: ids are below {self.tokenizer.vocab_size}.", param="prompt"
            )

    def _check_room(self, prompts: list[_Prompt], start: Context | None, max_tokens: int) -> None:
        room = self.engine.room
        if room is None:
            return
        before = 0 if start is None else start.num_tokens
        longest = max(len(prompt.tokens) for prompt in prompts)
        if before + longest + max_tokens > room:
            state = f"{before} tokens of the state, " if start is not None else ""
            raise ApiError(
                400, f"This model's full attention has room for {room} tokens here, and this asks for more: {state}"
                f"{longest} of the prompt and max_tokens={max_tokens}. The server's --context-tokens sets the room.",
                code="context_length_exceeded",
            )  # fmt: skip


def state_body(facts: StateFacts) -> Body:
    """A state as the API shows it."""
    return {"object": "state", **facts.model_dump(exclude={"tensors_sha256"})}


def state_error(error: Exception, param: str | None = None) -> ApiError:
    """What cannot be done with a state, as the API tells it."""
    text = f"{str(error)[0].upper()}{str(error)[1:]}"
    if isinstance(error, NoSuchStateError):
        return ApiError(404, text, param=param, code="state_not_found")
    if isinstance(error, StateExistsError):
        return ApiError(409, text, param=param, code="state_exists")
    if isinstance(error, StateError):
        return ApiError(400, text, param=param, code="invalid_state")
    if isinstance(error, DamagedError):
        return ApiError(422, text, param=param, code="state_damaged")
    return ApiError(507, f"The state could not be saved: {error}.", kind="server_error", param=param)


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], number: int, event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, (number, event))

"""A conversation with a model in this process: turns that cost what they add, states that are saved and forked."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from base.errors import UserError
from bmojo.generation import MAX_SEED
from data.tokenizer import Tokenizer
from pipelines.serving import template
from pipelines.serving.context import Context
from pipelines.serving.engine import Engine
from pipelines.serving.job import Answered, Done, Drawing, Event, Failed, Job, PromptRead
from pipelines.serving.states import StateStore

Mode = Literal["plain", "chat"]


class Conversation:
    """What was said so far, as a context; nothing said before is read again.

    Attributes:
        context: None: nothing was said.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, store: StateStore, drawing: Drawing, mode: Mode, system: str = ""
    ) -> None:
        """Args: mode: plain: the model goes on with the text; chat: lines of a user and an assistant. system: text
        before the first of them."""
        self.context: Context | None = None
        self._engine, self._tokenizer, self._store = engine, tokenizer, store
        self._mode, self._system = mode, system
        stops = template.STOPS if mode == "chat" else ()
        self._drawing = replace(drawing, stops=(*stops, *drawing.stops))
        self._job: Job | None = None
        self._is_read = False  # its text
        self._events = queue.SimpleQueue[Event]()

    @property
    def num_tokens(self) -> int:
        """Read and drawn so far."""
        return 0 if self.context is None else self.context.num_tokens

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer as it is drawn. `interrupt` ends it; what was shown stays said.

        Raises: UserError: the text has no room.
        """
        tokens = self._tokens_of(text)
        self._check_room(len(tokens))
        self._events = events = queue.SimpleQueue[Event]()
        self._drawing = replace(self._drawing, seed=(self._drawing.seed + 1) % MAX_SEED)
        self._job = job = Job(tokens, self._drawing, events.put, self.context, keeps_context=True)
        self._is_read = False
        self._engine.submit([job])
        try:
            while True:
                match event := events.get():
                    case PromptRead():
                        self._is_read = True
                    case Answered():
                        yield event.text
                    case Done():
                        self.context = event.context
                        return
                    case Failed():
                        raise event.error
                    case _:
                        continue
        finally:
            job.cancel()
            self._job = None

    def interrupt(self) -> None:
        """End the answer; from any thread or a signal's handler. Before there is one, the text was not said."""
        if self._job is not None and self._is_read:
            self._job.end()
        elif self._job is not None:
            self._job.cancel()
            self._events.put(Done(self.context))

    def reset(self) -> None:
        """Forget everything."""
        self.context = None

    def save(self, state_id: str) -> None:
        """Keep what was said. Raises: StateError; UserError: nothing was said."""
        if self.context is None:
            raise UserError("nothing was said yet, so there is nothing to save.")
        self._store.save(state_id, self.context)

    def load(self, state_id: str) -> None:
        """Go on from what was kept. Raises: StateError; DamagedError."""
        self.context = self._store.load(state_id)

    def _tokens_of(self, text: str) -> list[int]:
        begins = self.context is None
        if self._mode == "chat":
            system = [("system", self._system)] if begins and self._system else []
            text = template.as_text([*system, ("user", text)], continues=not begins)
        try:
            ids: list[int] = self._tokenizer.encode_batch([text])[0].tolist()
        except UnicodeEncodeError as error:
            raise UserError("the text cannot be encoded in UTF-8.") from error
        return [*self._tokenizer.start_ids, *ids] if begins else ids

    def _check_room(self, num_tokens: int) -> None:
        room = self._engine.room
        if room is not None and self.num_tokens + num_tokens + self._drawing.max_tokens > room:
            raise UserError(
                f"this model's full attention has room for {room} tokens, of which {self.num_tokens} are in use: "
                "/reset, or start again with a larger --context-tokens."
            )

"""What is asked of the engine, and what it tells while it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines.serving.context import Context
from pipelines.serving.scores import TokenScore


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: see bmojo.generation.generate.

    stops: texts that end an answer and are no part of it. ignores_end: go on past the end of the document.
    num_logprobs: score each token, beside so many of the likeliest; None: do not.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stops: tuple[str, ...] = ()
    ignores_end: bool = False
    num_logprobs: int | None = None


@dataclass(frozen=True)
class PromptRead:
    """The prompt is read; scores of its tokens if they were asked for."""

    scores: list[TokenScore | None]


@dataclass(frozen=True)
class DrawnToken:
    """A token of an answer. start: characters of the answer before it. score: if it was asked for."""

    id: int
    start: int
    score: TokenScore | None


@dataclass(frozen=True)
class Answered:
    """What a choice's answer grew by: text, and the tokens whose text is now out."""

    choice: int
    text: str
    tokens: tuple[DrawnToken, ...]


@dataclass(frozen=True)
class Finished:
    """A choice's answer is complete. reason: as in the API; num_tokens: drawn, without the end of the document."""

    choice: int
    reason: str
    num_tokens: int


@dataclass(frozen=True)
class Done:
    """Nothing follows. context: after prompt and answer, if it was asked for."""

    context: Context | None


@dataclass(frozen=True)
class Failed:
    """Nothing follows."""

    error: BaseException


Event = PromptRead | Answered | Finished | Done | Failed


@dataclass(eq=False)
class Job:
    """A prompt and its answers.

    Args:
        tokens: to be read; may be empty if there is a start.
        start: what they continue; None: the beginning.
        num_choices: answers, each drawn from a generator of its own, seeded drawing.seed + its number.
        tell: called in the engine's thread; must return soon.
        scores_prompt: whether PromptRead has scores; drawing.num_logprobs is then set.
        keeps_context: whether Done has a context; there is one choice then.
    """

    tokens: list[int]
    drawing: Drawing
    tell: Callable[[Event], None]
    start: Context | None = None
    num_choices: int = 1
    scores_prompt: bool = False
    keeps_context: bool = False
    is_cancelled: bool = field(default=False, init=False)
    is_ended: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.is_cancelled = True

    def end(self) -> None:
        """Finish the answers with what they have; from any thread."""
        self.is_ended = True

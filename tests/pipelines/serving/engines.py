"""Engines of tiny models, and what tests ask of them."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bmojo import BMojoLM, ModelConfig
from pipelines.serving.context import Context
from pipelines.serving.engine import Engine, Limits, Meter
from pipelines.serving.job import Answered, Done, Drawing, Event, Failed, Finished, Job, PromptRead
from tests.pipelines.stages.trained_run import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def odd_model(pattern: str) -> BMojoLM:
    """One with 3 heads, whose gates fill no vector register."""
    config = ModelConfig(
        pattern=pattern, vocab_size=320, d_model=48, num_heads=3, window_size=16, chunk_size=8, num_eidetic=5,
        d_state=8, ssm_head_dim=16, ssm_expand=1, init_std=0.1,
    )  # fmt: skip
    return BMojoLM(config).eval()


@contextmanager
def running(model: BMojoLM | None = None, limits: Limits | None = None, meter: Meter | None = None) -> Iterator[Engine]:
    engine = Engine(model or tiny_model(), TOKENIZER, limits or Limits(num_rows=16, piece_tokens=8), meter)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Heard:
    """All that a job told."""

    job: Job
    events: queue.SimpleQueue[Event]
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    context: Context | None = None
    error: BaseException | None = None

    def wait(self) -> Heard:
        """Until nothing follows."""
        while True:
            match event := self.events.get(timeout=300):
                case PromptRead():
                    pass
                case Answered():
                    self.texts[event.choice] = self.texts.get(event.choice, "") + event.text
                    self.tokens.setdefault(event.choice, []).extend(token.id for token in event.tokens)
                case Finished():
                    self.reasons[event.choice] = event.reason
                case Done():
                    self.context = event.context
                    return self
                case Failed():
                    self.error = event.error
                    return self


def job_of(text: str | Sequence[int], drawing: Drawing, start: Context | None = None, **others: object) -> Heard:
    """A job for a text, and what hears it. Text that begins comes after the end-of-document token."""
    tokens = TOKENIZER.encode_batch([text])[0].tolist() if isinstance(text, str) else list(text)
    if isinstance(text, str) and start is None:
        tokens = [TOKENIZER.eod_id, *tokens]
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    return Heard(Job(tokens, drawing, events.put, start, **others), events)  # type: ignore[arg-type]


def ask(engine: Engine, text: str | Sequence[int], drawing: Drawing, **others: object) -> Heard:
    heard = job_of(text, drawing, **others)  # type: ignore[arg-type]
    engine.submit([heard.job])
    return heard

"""What the server counts, in Prometheus's text format."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.serving.engine import Load, Meter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_WINDOW_S = 10.0
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics(Meter):
    """Counters of one server; the engine tells it of tokens, the HTTP side of requests."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("bmojo_requests", "Answered requests.", ["path", "status"], registry=registry)
        self._read = Counter("bmojo_prompt_tokens", "Tokens of prompts and of kept answers read.", registry=registry)
        self._drawn = Counter("bmojo_completion_tokens", "Tokens drawn.", registry=registry)
        self._step_s = Histogram(
            "bmojo_step_seconds", "Time for a token of all answers.", buckets=_SECONDS, registry=registry
        )
        self._answers = Histogram(
            "bmojo_batch_size", "Answers drawn at once, per step.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.first_token_s = Histogram(
            "bmojo_first_token_seconds", "From request to first text.", buckets=_SECONDS, registry=registry
        )
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        rate = Gauge("bmojo_completion_tokens_per_second", "Tokens drawn, of the last 10 s.", registry=registry)
        rate.set_function(self.tokens_per_s)

    def watch(self, load: Callable[[], Load]) -> None:
        """Report an engine's load from now on."""
        for name, text, of in (
            ("bmojo_batch_rows", "Answers that can be drawn at once.", lambda: load().num_rows),
            ("bmojo_answers_running", "Answers being drawn.", lambda: load().num_drawing),
            ("bmojo_answers_waiting", "Answers that wait, or whose prompt is read.", lambda: load().num_waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(of)

    def answered(self, path: str, status: int) -> None:
        """A request got this status."""
        self._requests.labels(path, str(status)).inc()

    def read(self, num_tokens: int) -> None:
        self._read.inc(num_tokens)

    def drawn(self, num_tokens: int) -> None:
        self._drawn.inc(num_tokens)
        with self._lock:
            self._recent.append((time.monotonic(), num_tokens))
            self._forget_old()

    def stepped(self, num_rows: int, duration_s: float) -> None:
        self._step_s.observe(duration_s)
        self._answers.observe(num_rows)

    def tokens_per_s(self) -> float:
        """Tokens drawn per second, over the last 10 s."""
        with self._lock:
            self._forget_old()
            return sum(count for _, count in self._recent) / _WINDOW_S

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)

    def _forget_old(self) -> None:
        oldest = time.monotonic() - _WINDOW_S
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()

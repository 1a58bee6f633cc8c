"""The one thread that owns the model: it reads prompts piece by piece, and draws a token of all answers at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from bmojo import BMojoLM
from bmojo.generation import sample
from data.tokenizer import Tokenizer
from pipelines.serving.answer import Answer
from pipelines.serving.batch import Batch, rounded
from pipelines.serving.context import Context, Reading, Scoring
from pipelines.serving.job import Done, Drawing, Failed, Finished, Job, PromptRead
from pipelines.serving.scores import TokenScore, token_scores
from pipelines.stages.train.device import device_of

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """More is asked than may wait."""


@dataclass(frozen=True)
class Limits:
    """Of an engine.

    num_rows: answers drawn at a time, at least. queue_size: answers that may wait beside those. piece_tokens: tokens of
    a prompt that are read between two of the answers. context_tokens: room of a row in layers of full attention.
    """

    num_rows: int = 16
    queue_size: int = 256
    piece_tokens: int = 128
    context_tokens: int = 4096

    @property
    def most(self) -> int:
        """Answers under way or waiting."""
        return self.num_rows + self.queue_size


@dataclass(frozen=True)
class Load:
    """Answers that can be drawn at a time, those that are, and those that wait."""

    num_rows: int
    num_drawing: int
    num_waiting: int


class Meter:
    """What an engine tells about its work, from its thread. This one does not listen."""

    def read(self, num_tokens: int) -> None:
        """So many tokens of prompts were read."""

    def drawn(self, num_tokens: int) -> None:
        """So many tokens of answers were drawn."""

    def stepped(self, num_rows: int, duration_s: float) -> None:
        """So many rows read a token each, and the next was drawn."""


@dataclass(eq=False)
class _Asked:
    """A job under way. reading: the prompt, and after the answer what is to be kept."""

    job: Job
    reading: Reading
    waiting: deque[Answer]
    prompt: Context | None = None
    num_unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_unfinished = len(self.waiting)


@dataclass(eq=False)
class _Seat:
    """An answer in a row of the batch. next_token: drawn, and not read yet."""

    asked: _Asked
    answer: Answer
    row: int
    next_token: int = 0


class Engine:
    """Answers jobs, from `start` to `close`.

    Each turn draws a token of every answer that has a row, then reads a piece of one prompt. So those who draw wait
    for one piece at most, and prompts that are read at the same time take turns.

    Attributes:
        num_rows: answers that are drawn at a time.
        room: tokens of prompt and answer together; None: any number.
    """

    def __init__(self, model: BMojoLM, tokenizer: Tokenizer, limits: Limits, meter: Meter | None = None) -> None:
        self.limits = limits
        self._model, self._tokenizer, self._meter = model, tokenizer, meter or Meter()
        self.num_rows = rounded(model, limits.num_rows)
        self._device = device_of(model)
        self._begin()
        self.room = self._batch.room
        self._lock = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._num_promised = 0  # answers asked for and not finished
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def _begin(self) -> None:
        self._batch = Batch(self._model, self.num_rows, self.limits.context_tokens)
        self._under_way: list[_Asked] = []
        self._to_read: deque[_Asked] = deque()
        self._to_seat: deque[_Asked] = deque()  # prompts that are read, whose answers wait for rows
        self._seats: dict[int, _Seat] = {}

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Fail what is not done, and end the thread."""
        with self._lock:
            self._is_closing = True
            self._lock.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Begin them all, or none. Raises: QueueFullError."""
        jobs = list(jobs)
        count = sum(job.num_choices for job in jobs)
        with self._lock:
            if self._is_closing:
                raise QueueFullError("the server is stopping")
            if self._num_promised + count > self.limits.most:
                raise QueueFullError(
                    f"{self._num_promised} answers are under way or wait; with {count} more there would be over "
                    f"{self.limits.most}, the limit"
                )
            self._num_promised += count
            self._inbox += jobs
            self._lock.notify()

    def load(self) -> Load:
        """What there is to do, from any thread."""
        with self._lock:
            num_drawing = len(self._seats)
            return Load(self.num_rows, num_drawing, max(0, self._num_promised - num_drawing))

    # All that follows runs in the engine's thread.

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (self._inbox or self._under_way or self._is_closing):
                    self._lock.wait()
                taken = list(self._inbox)
                self._inbox.clear()
            try:
                for job in taken:
                    self._take(job)
                if self._is_closing:
                    raise RuntimeError("the server was stopped before the answer was complete")
                self._look_after_jobs()
                self._draw()
                self._read()
                self._fill_rows()
            except Exception as error:
                if not self._is_closing:
                    logger.exception("the engine failed; it begins again, and what was under way is lost")
                self._fail_all(error)
                if self._is_closing:
                    return

    def _take(self, job: Job) -> None:
        scoring = self._scoring(job.drawing) if job.scores_prompt else None
        answers = deque(Answer(n, job.drawing, self._tokenizer, self._device) for n in range(job.num_choices))
        try:
            reading = Reading(self._model, job.start, job.tokens, self.limits.piece_tokens, scoring)
        except Exception as error:
            self._release(job.num_choices)
            job.tell(Failed(error))
            return
        asked = _Asked(job, reading, answers)
        self._under_way.append(asked)
        self._to_read.append(asked)

    def _look_after_jobs(self) -> None:
        """Drop those that were cancelled, and end those that are to end."""
        for asked in [asked for asked in self._under_way if asked.job.is_cancelled]:
            self._drop(asked)
        for asked in [asked for asked in self._under_way if asked.job.is_ended and asked.prompt is not None]:
            seats = [seat for seat in self._seats.values() if seat.asked is asked]
            answers = [*asked.waiting, *(self._leave(seat) for seat in seats)]
            asked.waiting.clear()
            for answer in answers:
                asked.job.tell(answer.end("stop"))
                self._finish(asked, answer)

    def _draw(self) -> None:
        """Read the token that was drawn last in each row, and draw the next."""
        if not self._seats:
            return
        begun = time.perf_counter()
        logits_bv = self._batch.step({row: seat.next_token for row, seat in self._seats.items()})
        seats = list(self._seats.values())
        self._draw_next(seats, logits_bv[[seat.row for seat in seats]])
        self._meter.stepped(len(seats), time.perf_counter() - begun)

    def _draw_next(self, seats: list[_Seat], logits_bv: Tensor) -> None:
        """A token for each seat, from its row of the logits. Answers that end leave their rows."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, seat in enumerate(seats):
            drawing = seat.answer.drawing
            how = (drawing.temperature, drawing.top_k, drawing.top_p, drawing.num_logprobs)
            alike.setdefault(how, []).append(index)
        allowed_bv = logits_bv.clone()
        allowed_bv[:, self._tokenizer.vocab_size :] = float("-inf")
        for indices in alike.values():
            drawing = seats[indices[0]].answer.drawing
            rngs = [seats[index].answer.rng for index in indices]
            tokens_b = sample(allowed_bv[indices], drawing.temperature, drawing.top_k, drawing.top_p, rngs)
            tokens = tokens_b.tolist()
            scores: list[TokenScore | None] = [None] * len(tokens)
            if drawing.num_logprobs is not None:
                scores = [*token_scores(logits_bv[indices], tokens, *self._scoring(drawing))]
            for index, token, score in zip(indices, tokens, scores, strict=True):
                self._add(seats[index], token, score)
        self._meter.drawn(len(seats))

    def _add(self, seat: _Seat, token: int, score: TokenScore | None) -> None:
        seat.next_token = token
        told = seat.answer.add(token, score)
        if told.text or told.tokens:
            seat.asked.job.tell(told)
        if seat.answer.reason is not None:
            self._finish(seat.asked, self._leave(seat))

    def _read(self) -> None:
        """A piece of the prompt whose turn it is."""
        if not self._to_read:
            return
        asked = self._to_read.popleft()
        reading = asked.reading
        if not reading.is_done:
            self._meter.read(reading.advance())
        if not reading.is_done:
            self._to_read.append(asked)
        elif asked.prompt is not None:
            self._done(asked, reading.context)
        else:
            asked.prompt = reading.context
            asked.job.tell(PromptRead(reading.scores))
            self._to_seat.append(asked)

    def _fill_rows(self) -> None:
        """Give free rows to answers that wait, first come, first served."""
        while self._to_seat and self._batch.num_free:
            asked = self._to_seat[0]
            if not asked.waiting:
                self._to_seat.popleft()
                continue
            answer, prompt = asked.waiting.popleft(), asked.prompt
            assert prompt is not None
            if answer.reason is not None:  # of no tokens
                self._finish(asked, answer)
                continue
            seat = _Seat(asked, answer, self._batch.join(prompt))
            self._seats[seat.row] = seat
            self._draw_next([seat], prompt.logits_v[None])

    def _leave(self, seat: _Seat) -> Answer:
        del self._seats[seat.row]
        self._batch.leave(seat.row)
        return seat.answer

    def _finish(self, asked: _Asked, answer: Answer) -> None:
        assert answer.reason is not None
        asked.job.tell(Finished(answer.choice, answer.reason, answer.num_tokens))
        asked.num_unfinished -= 1
        self._release(1)
        if asked.num_unfinished:
            return
        if not asked.job.keeps_context:
            self._done(asked, None)
            return
        tokens = answer.tokens_of_text()
        asked.reading = Reading(self._model, asked.prompt, tokens, self.limits.piece_tokens)
        self._to_read.append(asked)

    def _done(self, asked: _Asked, context: Context | None) -> None:
        self._under_way.remove(asked)
        asked.job.tell(Done(context))

    def _drop(self, asked: _Asked) -> None:
        for seat in [seat for seat in self._seats.values() if seat.asked is asked]:
            self._leave(seat)
        for queue in (self._to_read, self._to_seat):
            if asked in queue:
                queue.remove(asked)
        self._under_way.remove(asked)
        self._release(asked.num_unfinished)

    def _fail_all(self, error: BaseException) -> None:
        failed = self._under_way
        self._begin()
        for asked in failed:
            self._release(asked.num_unfinished)
            asked.job.tell(Failed(error))

    def _release(self, num_answers: int) -> None:
        with self._lock:
            self._num_promised -= num_answers

    def _scoring(self, drawing: Drawing) -> Scoring:
        return Scoring(drawing.num_logprobs or 0, self._tokenizer.vocab_size)

"""What the stages of a run printed, and their workers: attempt by attempt, to the end or as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from base.errors import UserError
from pipelines.engine.events import Status
from pipelines.engine.history import AttemptHistory, History
from pipelines.engine.lease import Watch
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.engine.state import UNFINISHED, RunState
from pipelines.storage import LocalStorage
from pipelines.tracking.spool import Spool

FOLLOW_EVERY_S = 0.5
_FAR_AWAY_EVERY_S = 5.0  # a log in an object store, which its driver copies there every 20 s


class LogLine(Facts):
    """One line of a stage's output."""

    stage: str
    attempt: int  # as `status` counts them
    line: str


def logs(
    run: Run,
    stage: str | None = None,
    attempt: int | None = None,
    lines: int | None = None,
    follow: bool = False,
    on_watch: Watch | None = None,
) -> Iterator[LogLine]:
    """What a stage printed, or every stage of the run.

    Args:
        attempt: which of the stage's attempts; left out: the last one, and with `follow` those after it.
        lines: only so many at the end of each log, before what comes.
        follow: go on until the stage, or the run, has ended, or its driver is gone.
        on_watch: see Run.state.
    Raises: UserError: there is no such attempt, or no readable history.
    """
    history = History(run)
    names = list(history.state(on_watch).stages) if stage is None else [stage]
    if attempt is not None:
        for name in names:
            _require(history, name, attempt)
    followed = [_Followed(run, name, attempt, lines) for name in names]
    while True:
        state = history.state(on_watch)  # before its logs are read: what was printed until then is in them
        for one in followed:
            yield from one.new(history.attempts.get(one.stage, ()))
        if not follow or all(one.is_over(history, state) for one in followed):
            break
        time.sleep(FOLLOW_EVERY_S)
    for one in followed:
        yield from one.rest()


def _require(history: History, stage: str, attempt: int) -> None:
    count = len(history.attempts.get(stage, ()))
    if not 1 <= attempt <= count:
        there = f"attempts 1 to {count}" if count > 1 else "attempt 1" if count else "no attempt yet"
        raise UserError(f"Stage {stage} of run {history.run.run_id} has no attempt {attempt}: there is {there}.")


@dataclass
class _Followed:
    """A stage whose logs are read as they grow."""

    run: Run
    stage: str
    only: int | None  # the one attempt that is asked for
    lines: int | None
    _reader: _Reader | None = field(default=None, init=False)
    _number: int = field(default=0, init=False)

    def new(self, attempts: Sequence[AttemptHistory]) -> Iterator[LogLine]:
        wanted = [attempt for attempt in attempts if self.only in (None, attempt.number)]
        if self._reader is None:
            wanted = wanted[-1:]
        for attempt in wanted:
            if attempt.number > self._number:
                yield from self.rest()
                self._reader = _Reader(self.run, attempt.log)
                self._number = attempt.number
                read = self._reader.lines()
                yield from self._named(read if self.lines is None else read[max(0, len(read) - self.lines) :])
                self.lines = None
            elif attempt.number == self._number and self._reader is not None:
                yield from self._named(self._reader.lines())

    def rest(self) -> Iterator[LogLine]:
        """What is left of the current log, also a line without an end."""
        if self._reader is not None:
            yield from self._named(self._reader.rest())

    def is_over(self, history: History, state: RunState) -> bool:
        if state.status is not Status.RUNNING:
            return True
        if self.only is not None and history.attempts[self.stage][self.only - 1].outcome is not None:
            return True
        return state.stages[self.stage].status not in UNFINISHED

    def _named(self, lines: Sequence[str]) -> Iterator[LogLine]:
        return (LogLine(stage=self.stage, attempt=self._number, line=line) for line in lines)


class _Reader:
    """Reads the new whole lines of one log."""

    def __init__(self, run: Run, log: str) -> None:
        self._storage, self._relpath = run.storage, f"{run.relpath}/{log}"
        self._here = Spool(run.storage, run.relpath).dir / log  # if this machine's driver writes it
        self._offset, self._torn = 0, b""
        self._version, self._looked_at = "", float("-inf")

    def lines(self) -> list[str]:
        data = self._new()
        self._offset += len(data)
        *whole, self._torn = (self._torn + data).split(b"\n")
        return [_text(line) for line in whole]

    def rest(self) -> list[str]:
        self._looked_at = float("-inf")
        lines = self.lines()
        torn, self._torn = self._torn, b""
        return [*lines, *([_text(torn)] if torn else [])]

    def _new(self) -> bytes:
        try:
            with open(self._here, "rb") as file:
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b"" if isinstance(self._storage, LocalStorage) else self._new_from_afar()

    def _new_from_afar(self) -> bytes:
        if time.monotonic() < self._looked_at + _FAR_AWAY_EVERY_S:
            return b""
        self._looked_at = time.monotonic()
        version = self._storage.files_under(self._relpath).get("", "")
        if version == self._version:
            return b""
        self._version = version
        try:
            return self._storage.read_bytes(self._relpath)[self._offset :]
        except FileNotFoundError:
            return b""


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")

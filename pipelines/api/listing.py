"""The runs of a storage."""

from __future__ import annotations

import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Literal

from base.errors import UserError
from base.names import suggest
from pipelines.api.run_status import elapsed_s
from pipelines.engine.events import Status
from pipelines.engine.lease import Watch
from pipelines.engine.runs import Run
from pipelines.engine.runs import list_runs as runs_of
from pipelines.engine.stage import Facts
from pipelines.storage import Storage

DAMAGED: Literal["DAMAGED"] = "DAMAGED"
_LOOKERS = 16  # drivers of other machines are watched side by side
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST = 20_000  # of any unit: in weeks, as far back as the calendar goes


class RunRow(Facts):
    """One run. Times are ISO 8601 in UTC."""

    run: str
    name: str  # of the pipeline
    status: Status | Literal["DAMAGED"]
    url: str
    stages_done: int
    stages_total: int
    started_at: str | None
    finished_at: str | None
    time_s: float | None
    error: str | None  # of a damaged run: what is wrong


def list_runs(
    storage: Storage,
    statuses: Collection[str] = (),
    name: str | None = None,
    since: datetime | None = None,
    on_watch: Watch | None = None,
) -> list[RunRow]:
    """The runs of a storage, the latest last.

    Args:
        statuses: only these, such as RUNNING; or DAMAGED. Left out: all.
        name: only runs of this pipeline.
        since: only runs that were started, or ended, at this time or later.
        on_watch: see Run.state.
    """
    runs = [run for run in runs_of(storage) if name is None or run.run_id.rpartition("-")[0] == name]
    with ThreadPoolExecutor(max_workers=_LOOKERS) as pool:
        rows = list(pool.map(lambda run: _row(run, on_watch), runs))
    return [row for row in rows if (not statuses or row.status in statuses) and _is_since(row, since)]


def checked_statuses(words: Collection[str]) -> list[str]:
    """The statuses that words in any case name. Raises UserError: one of them is none."""
    known = [*(str(status) for status in Status), DAMAGED]
    for word in words:
        if word.upper() not in known:
            raise UserError(f"--status {word}: there is no such status.{suggest(word.upper(), known)}")
    return [word.upper() for word in words]


def parsed_age(text: str) -> timedelta:
    """The time that `90m`, `12h` or `7d` means. Raises UserError: it means none."""
    age = re.fullmatch(r"(\d+)([smhdw])", text)
    if age is None:
        raise UserError(f"{text!r} is not an age, such as 90m, 12h or 7d.")
    return timedelta(**{_UNITS[age[2]]: min(int(age[1]), _LONGEST)})


def parsed_since(text: str, now: datetime | None = None) -> datetime:
    """The time that `2026-11-27`, `2026-11-27T10:00` (UTC) or an age such as `90m`, `12h`, `7d` means.

    Raises: UserError: it means none.
    """
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        try:
            return (now or datetime.now(UTC)) - parsed_age(text)
        except UserError:
            raise UserError(
                f"{text!r} is neither a time, such as 2026-11-27 or 2026-11-27T10:00 (UTC), nor an age, such as 90m, "
                "12h or 7d."
            ) from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _row(run: Run, on_watch: Watch | None) -> RunRow:
    name = run.run_id.rpartition("-")[0]
    try:
        state = run.state(on_watch)
    except UserError as error:
        return RunRow(
            run=run.run_id, name=name, status=DAMAGED, url=run.url, stages_done=0, stages_total=0, started_at=None,
            finished_at=None, time_s=None, error=str(error),
        )  # fmt: skip
    return RunRow(
        run=run.run_id,
        name=state.info.name,
        status=state.status,
        url=run.url,
        stages_done=sum(stage.status is Status.SUCCEEDED for stage in state.stages.values()),
        stages_total=len(state.stages),
        started_at=state.started_at,
        finished_at=state.finished_at,
        time_s=elapsed_s(state),
        error=state.error,
    )


def _is_since(row: RunRow, since: datetime | None) -> bool:
    if since is None or row.status == DAMAGED:
        return True
    times = [datetime.fromisoformat(time) for time in (row.started_at, row.finished_at) if time]
    return row.status is Status.RUNNING or any(time >= since for time in times)

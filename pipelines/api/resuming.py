"""Resuming runs as they were configured, without their pipeline files, from any directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from pipelines.api.listing import list_runs
from pipelines.engine.events import Status
from pipelines.engine.failures import EXIT_BUG, EXIT_CANCELLED, EXIT_RESUMABLE, EXIT_STOPPED, EXIT_USER, classify
from pipelines.engine.interrupts import is_ending
from pipelines.engine.lease import Watch
from pipelines.engine.observer import Observer
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.errors import ConfigError
from pipelines.loading import validate_pipeline
from pipelines.session import run_config
from pipelines.storage import Storage

_WORST_FIRST = (EXIT_BUG, EXIT_USER, EXIT_CANCELLED, EXIT_RESUMABLE, EXIT_STOPPED)


class ResumedRun(Facts):
    """How the drive of a resumed run ended."""

    run: str
    status: Status
    exit_code: int
    error: str | None


def resume(run: Run, observer: Observer | None = None) -> RunResult:
    """Resume a run. Relative paths start where they did when it was started.

    Raises: ConfigError: another version of this program started it. Else as pipelines.session.run_config.
    """
    observer = observer or Observer()
    info = run.info()
    try:
        config = validate_pipeline({**info.config, "storage": run.storage.url}, run.url)
    except ConfigError as error:
        file = info.config_path or "FILE"
        raise ConfigError(
            f"{error}\nAnother version of this program started the run. Adapt its pipeline file, then resume with: "
            f"bmojo run {quote(file)}"
        ) from None
    base_dir = info.base_dir
    if base_dir and not Path(base_dir).is_dir():
        observer.on_notice(f"{base_dir}, where the run was started, is not there; relative paths start here instead.")
        base_dir = None
    with contextlib.chdir(base_dir) if base_dir else contextlib.nullcontext():
        return run_config(config, info.config_path, observer, run)


def resume_all(
    storage: Storage,
    observer: Callable[[Run], Observer] = lambda run: Observer(),
    on_watch: Watch | None = None,
) -> list[ResumedRun]:
    """Resume each run of a storage that is RESUMABLE, one after the other, so that each has the machine to itself.

    Runs that are driven now are left alone, also those that somebody else resumes meanwhile. An error in one does not
    keep the next from being resumed; Ctrl-C and SIGTERM do.

    Args: observer: makes the observer of a run. on_watch: see Run.state.
    """
    done = []
    for row in list_runs(storage, statuses=[Status.RESUMABLE], on_watch=on_watch):
        run = Run(storage, row.run)
        try:
            failure = resume(run, observer(run)).failure
        except Exception as error:
            failure = classify(error)
        if failure is None:
            done.append(ResumedRun(run=row.run, status=Status.SUCCEEDED, exit_code=0, error=None))
        else:
            done.append(ResumedRun(run=row.run, status=failure.status, exit_code=failure.exit_code, error=failure.text))
        if is_ending():
            break
    return done


def worst_exit_code(runs: list[ResumedRun]) -> int:
    """0 if all succeeded; else what needs a person before what passes: 70, 1, 130, 75, 3."""
    codes = {run.exit_code for run in runs}
    return next((code for code in _WORST_FIRST if code in codes), max(codes, default=0))

"""Runs whose log is written by hand, for tests of what reads it."""

from __future__ import annotations

from typing import Any

from pipelines.engine.events import Planned, RunInfo
from pipelines.engine.runs import Run
from pipelines.storage import Storage


def made_run(
    storage: Storage,
    run_id: str,
    config: dict[str, Any],
    kinds: dict[str, str] | None = None,
    fingerprints: dict[str, str] | None = None,
    **info: Any,
) -> Run:
    """A run that its first driver has begun and does not hold.

    Args: kinds: of its stages, by name. fingerprints: likewise; left out: 64 times f.
    """
    run = Run(storage, run_id)
    kinds = kinds or {}
    facts: dict[str, Any] = {
        "name": run_id.rpartition("-")[0],
        "config_path": None,
        "created_at": "2026-01-01T00:00:00.000+00:00",
        "git_commit": None,
        **info,
    }
    fingerprints = fingerprints or dict.fromkeys(kinds, "f" * 64)
    run.log(1).append(
        Planned(info=RunInfo(run_id=run_id, config=config, fingerprints=fingerprints, kinds=kinds, **facts))
    )
    return run

"""Where to look at a run: a web page for each tracker that has one, else the command that shows it."""

from __future__ import annotations

from typing import Any

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.storage import Storage
from pipelines.tracking.config import stored_targets
from pipelines.tracking.replay import RUN_JOURNAL


def tracking_links(storage: Storage, run_relpath: str, config: dict[str, Any]) -> dict[str, str]:
    """Address or command by tracker; the run's own page where its points have got there.

    Args: config: the one that the run was stored with.
    """
    if "tracking" not in config:
        return {}
    try:
        targets = stored_targets(config, storage)
    except UserError:  # of another version of this program
        return {}
    found = {}
    for target in targets:
        try:
            runs = storage.read_json(f"{run_relpath}/delivered-{target.key}.json").get("runs", {})
        except (FileNotFoundError, UserError, InfrastructureError):
            runs = {}
        link = target.link(runs.get(RUN_JOURNAL), storage)
        if link:
            found[target.name] = link
    return found

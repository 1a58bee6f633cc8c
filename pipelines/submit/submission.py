"""Submitting a pipeline: from its file to a job on the cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from base.errors import UserError
from pipelines.loading import load_pipeline
from pipelines.redact import redact
from pipelines.storage import LocalStorage, open_storage
from pipelines.submit.dashboard import connect, dashboard_address, is_on_this_machine
from pipelines.submit.environment import choose, not_shipped
from pipelines.submit.job import RESTARTS, Job, Request
from pipelines.submit.package import choose_files
from pipelines.submit.paths import common_base, find_inputs, find_storage

_SHOWN_LEFT_OUT = 5


def submit(
    config: Path,
    overrides: Sequence[str] = (),
    address: str | None = None,
    variables: Sequence[str] = (),
    working_dir: Path | None = None,
    restarts: int = RESTARTS,
    on_note: Callable[[str], None] = lambda text: None,
) -> Job:
    """Ship a pipeline to a Ray cluster, and start it there as a job.

    Args:
        address: URL of the cluster's dashboard; None: as dashboard_address finds it.
        variables: names of variables to ship, as environment.choose takes them.
        working_dir: the folder to ship; None: that of the pipeline file.
        restarts: of a scheduler that dies without progress (pipelines.supervisor).
        on_note: takes what the user may want to know.
    Raises: ConfigError, UserError: the file, an option, or a path that the cluster cannot see. InfrastructureError:
            the cluster does not answer.
    """
    given = list(overrides)
    _refuse_secrets(given)
    loaded = load_pipeline(config, given)
    chosen = choose(variables)
    url = dashboard_address(address)
    folder = (working_dir or config.parent).resolve()
    if not folder.is_dir():
        raise UserError(f"--working-dir {working_dir}: no such folder.")
    client = connect(url)
    is_here = is_on_this_machine(url)
    storage, storage_note = find_storage(loaded.storage, is_here)
    inputs = find_inputs(loaded.graph(), is_here)
    if storage != loaded.storage:
        given.append(f"storage={storage}")
    if loaded.cluster.address not in ("local", "auto"):
        given.append("cluster.address=auto")
    opened = open_storage(storage)
    stays = Path(opened.url) if isinstance(opened, LocalStorage) else None
    config_file = Path(os.path.normpath(config.absolute()))
    contents = choose_files(folder, [config_file, *inputs.shipped], stays)
    notes = (storage_note, *inputs.notes, _on_left_out(folder, contents.left_out), _on_variables(not_shipped(chosen)))
    for note in filter(None, notes):
        on_note(note)
    request = Request(
        name=loaded.name,
        config=config_file,
        overrides=given,
        restarts=restarts,
        contents=contents,
        base=common_base([Path.cwd(), *(file.parent for file in contents.files)]),
        variables=chosen,
    )
    return Job.submit(client, url, request)


def _refuse_secrets(overrides: Sequence[str]) -> None:
    """Ray shows the command of a job to everyone who may list jobs."""
    for override in overrides:
        name, _, value = override.partition("=")
        field = name.rpartition(".")[2]
        if redact({field: value}) != {field: value}:
            raise UserError(
                f"override {name}=...: its value looks like a secret, and Ray shows the command of a job. Write it "
                "into the pipeline file, or ship a variable with --env."
            )


def _on_left_out(folder: Path, left_out: Sequence[str]) -> str | None:
    if not left_out:
        return None
    more = f" and {len(left_out) - _SHOWN_LEFT_OUT} more" if len(left_out) > _SHOWN_LEFT_OUT else ""
    return f"not shipped of {folder}: {', '.join(left_out[:_SHOWN_LEFT_OUT])}{more}."


def _on_variables(names: Sequence[str]) -> str | None:
    return f"set here, and not shipped: {', '.join(names)}. --env NAME ships one." if names else None

"""`bmojo gc`: room back from what nothing needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
from pipelines.cli.console import JsonOption, StorageOption, console, error_console, print_json, watched
from pipelines.storage import open_storage

if TYPE_CHECKING:
    from pipelines.api import GarbageReport


def gc(
    storage: StorageOption = "runs",
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; else it is only listed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Only what was not written to for so long: 90m, 12h, 7d.")
    ] = "1d",
    cache_older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Only cached files that were not used for so long.")
    ] = "30d",
    cache_max_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Shrink the cache to this: what was not used for longest goes first."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List, and with --delete throw away, what nothing needs any more. What somebody holds is never touched.

    That is: artifacts that no run names; leases, empty runs and unfinished writes of dead processes; cached files of
    this machine; folders of Ray's dead sessions here.

    Example: `bmojo gc`, then `bmojo gc --delete`
    """
    from pipelines.api.garbage import Limits, delete_garbage, find_garbage
    from pipelines.api.listing import parsed_age

    if delete and as_json and not yes:
        raise UserError("--delete with --json cannot ask: give --yes too.")
    limits = Limits(
        older_than_s=parsed_age(older_than).total_seconds(),
        cache_older_than_s=parsed_age(cache_older_than).total_seconds(),
        cache_max_bytes=None if cache_max_gb is None else int(cache_max_gb * 1e9),
    )
    found = find_garbage(open_storage(storage), limits, watched)
    if not as_json:
        _print(found.report())
    if not delete or not found.things:
        if as_json:
            print_json(found.report())
        elif found.things:
            console.print("Nothing was deleted. Delete it: bmojo gc --delete")
        return
    if not yes:
        typer.confirm(f"Delete these {len(found.things)}?", abort=True)
    deleted = delete_garbage(found)
    if as_json:
        print_json(deleted)
        return
    for note in deleted.notes[len(found.notes) :]:
        error_console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    console.print(f"Deleted {len(deleted.items)}, {_size(deleted.size_bytes)}.")


def _print(report: GarbageReport) -> None:
    for note in report.notes:
        error_console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    if not report.items:
        console.print("There is nothing to throw away.")
        return
    table = Table("what", "size", "files", "age", "why", "where", box=None, pad_edge=False)
    for item in report.items:
        table.add_row(
            item.what,
            _size(item.size_bytes),
            f"{item.num_files:,}",
            _age(item.age_s),
            escape(item.reason),
            escape(item.path),
        )
    console.print(table, soft_wrap=True)
    console.print(f"{len(report.items)} in all, {_size(report.size_bytes)}.")


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "?"
    return f"{age_s / 3600:.0f} h" if age_s < 48 * 3600 else f"{age_s / 86400:.0f} d"


def _size(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"

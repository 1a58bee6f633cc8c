"""`bmojo list` and its filters."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from base.errors import UserError
from pipelines import api
from pipelines.api.listing import parsed_since
from pipelines.engine.events import Ended, Status
from pipelines.storage import open_storage
from tests.pipelines.api.driving import World
from tests.pipelines.made_runs import made_run


@pytest.fixture
def mixed(world: World) -> World:
    storage = open_storage(world.storage)
    for name, status in (("one", Status.SUCCEEDED), ("two", Status.FAILED), ("two-more", None)):
        run = made_run(storage, f"{name}-1a2b3c4d", {"stages": {}}, {"first": "steps"})
        if status is not None:
            run.log(2).append(Ended(status=status, error="no text" if status is Status.FAILED else None))
    broken = made_run(storage, "broken-1a2b3c4d", {})
    (world.storage / "runs" / broken.run_id / "events" / "000001-000001.json").write_text("{")
    return world


def test_filters(mixed: World) -> None:
    def listed(*arguments: str) -> dict[str, str]:
        said = mixed.bmojo("list", "--json", *arguments)
        assert said.code == 0, said.err
        return {row["run"].rpartition("-")[0]: row["status"] for row in said.json}

    everything = {"one": "SUCCEEDED", "two": "FAILED", "two-more": "RESUMABLE", "broken": "DAMAGED"}
    assert listed() == everything
    assert listed("--status", "failed", "-s", "DAMAGED") == {"two": "FAILED", "broken": "DAMAGED"}
    assert listed("--name", "two") == {"two": "FAILED"}, "and not two-more"
    assert listed("--since", "1h") == everything
    assert listed("--since", "2999-01-01") == {"broken": "DAMAGED"}, "nobody knows when it worked"
    assert listed("--since", "1h", "--status", "resumable", "--name", "one") == {}


def test_what_is_wrong_with_a_filter(mixed: World) -> None:
    said = mixed.bmojo("list", "--status", "runing")
    assert said.code == 1
    assert "--status runing: there is no such status. Did you mean 'RUNNING'?" in said.err
    said = mixed.bmojo("list", "--since", "yesterday")
    assert said.code == 1
    assert "'yesterday' is neither a time" in said.err
    assert "that the filters let through" in mixed.bmojo("list", "--name", "three").out


def test_a_damaged_run_has_its_error_as_a_field(mixed: World) -> None:
    said = mixed.bmojo("list", "--json")
    assert said.err == ""
    rows = {row["run"]: row for row in said.json}
    assert "000001-000001.json" in rows["broken-1a2b3c4d"]["error"]
    assert rows["two-1a2b3c4d"]["error"] == "no text"
    assert api.list_runs(open_storage(mixed.storage), name="one")[0].stages_total == 1


def test_times_and_ages() -> None:
    now = datetime(2026, 11, 27, 12, tzinfo=UTC)
    assert parsed_since("90m", now) == now - timedelta(minutes=90)
    assert parsed_since("2w", now) == now - timedelta(days=14)
    assert parsed_since("2026-11-27", now) == datetime(2026, 11, 27, tzinfo=UTC)
    assert parsed_since("2026-11-27T10:00+02:00", now) == datetime(2026, 11, 27, 8, tzinfo=UTC)
    for text in ("", "5", "5y", "-3d", "99999999999999999999d", "2026-13-01"):
        try:
            parsed_since(text, now)
        except UserError:
            continue
        assert text.endswith("d"), "an age of any length is an age"

"""A job as this side sees it, with a dashboard that answers as told: the real one is in end_to_end/test_submit.py."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InfrastructureError
from pipelines.submit import job as job_module
from pipelines.submit.job import Job, Request, StartedRun, _entrypoint
from pipelines.submit.package import Contents


@dataclass
class Status:
    name: str

    def is_terminal(self) -> bool:
        return self.name != "RUNNING"


@dataclass
class Info:
    status: Status
    driver_exit_code: int | None = None
    message: str | None = None


@dataclass
class Dashboard:
    """Of each list, one entry per question; the last one for good."""

    infos: list[Info | Exception]
    logs: list[str] = field(default_factory=lambda: [""])
    streams: list[list[str | Exception]] = field(default_factory=lambda: [[]])

    def get_job_info(self, job_id: str) -> Info:
        found = self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]
        if isinstance(found, Exception):
            raise found
        return found

    def get_job_logs(self, job_id: str) -> str:
        return self.logs.pop(0) if len(self.logs) > 1 else self.logs[0]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]:
            if isinstance(text, Exception):
                raise text
            yield text


RUNNING = Info(Status("RUNNING"))


def a_job(dashboard: Any, pipeline: str = "mine") -> Job:
    return Job(dashboard, "http://head:8265", "mine-1", pipeline)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_POLL_S", 0.001)


@pytest.mark.parametrize(
    ("info", "code"),
    [
        (RUNNING, None),
        (Info(Status("SUCCEEDED"), 0), 0),
        (Info(Status("FAILED"), 130), 130),
        (Info(Status("FAILED"), -9), 75),
        (Info(Status("STOPPED")), 75),
    ],
)
def test_exit_codes(info: Info, code: int | None) -> None:
    assert a_job(Dashboard([info])).exit_code() == code


def test_the_run_is_read_from_what_the_job_says() -> None:
    said = "Running entrypoint for job\nmine-0a1b2c3d in s3://bucket/my runs\n  train: running ...\n"
    dashboard = Dashboard([RUNNING], ["", "Running entrypoint for job\n", said])
    assert a_job(dashboard).wait_for_run() == StartedRun("mine-0a1b2c3d", "s3://bucket/my runs")
    assert a_job(dashboard, "other").wait_for_run(timeout_s=0) is None
    assert a_job(Dashboard([Info(Status("FAILED"), 1)], ["error: no\n"])).wait_for_run() is None


def test_following_goes_on_after_a_lost_connection_where_it_was() -> None:
    dashboard = Dashboard(
        [RUNNING, ConnectionResetError("gone"), Info(Status("FAILED"), 75)],
        ["one two three end"],
        [["one ", ConnectionError("lost")], ["on", "e two "], ["one two three"]],
    )
    written: list[str] = []
    assert a_job(dashboard).follow(written.append) == 75
    assert "".join(written) == "one two three end"


def test_following_ends_when_the_dashboard_is_gone_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_PATIENCE_S", 0.01)
    dashboard = Dashboard([ConnectionRefusedError("gone")], streams=[[ConnectionError("lost")]])
    with pytest.raises(InfrastructureError, match=r"--address http://head:8265: .*gone"):
        a_job(dashboard).follow(lambda _: None)


def test_the_job_runs_the_same_command_in_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    request = Request(
        name="mine", config=tmp_path / "files/p.yaml", overrides=["train.lr=1e-3", "report.title=It's"], restarts=3,
        contents=Contents((), ()), base=tmp_path, variables={"TOKEN": "secret-value"},
    )  # fmt: skip
    folder, change, command = _entrypoint(request).split(" && ")
    assert shlex.split(folder) == ["mkdir", "-p", "job/else where"]
    assert shlex.split(change) == ["cd", "job/else where"]
    assert shlex.split(command) == [
        *("exec", "python", "-P", "-m", "pipelines.job_main"),
        *("run", "--restarts", "3", "../files/p.yaml", "train.lr=1e-3", "report.title=It's"),
    ]

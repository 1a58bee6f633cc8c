"""Who owns a run when drivers are stopped, cut off or killed: real processes, and the commands on a live driver."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from base.errors import UserError
from base.files import is_temporary
from pipelines.engine.events import Ended, Planned, Status
from pipelines.engine.lease import Lease, LeaseLostError
from pipelines.engine.observer import Observer
from pipelines.engine.plan import PlannedStage
from pipelines.engine.records import read_record, write_record
from pipelines.engine.runs import Run, list_runs
from pipelines.engine.scheduler import run_pipeline
from pipelines.storage import Storage, open_storage
from pipelines.tracking.journal import journals_of, read_events
from tests.pipelines import forked
from tests.pipelines.engine.counting_pipeline import SCRIPT, NoCluster, counting_pipeline, nowhere, run_here
from tests.pipelines.waiting import wait_until

SHORT = ("--ttl-s", "2", "--renew-s", "0.3")


def start(storage: str | Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [*SCRIPT, str(storage), *arguments]
    environ = os.environ | environment
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 0")
    return process


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str]:
    output = process.communicate(timeout=timeout_s)[0]
    return process.returncode, output


def bmojo(*arguments: str, cwd: Path | None = None, answer: str = "") -> tuple[int, str]:
    done = forked.bmojo(arguments, os.environ | {"COLUMNS": "200"}, cwd, answer)
    return done.code, done.out + done.err


def steps_told(run: Run) -> list[int]:
    journals = journals_of(Path(run.url) / "journal", "count")
    return [event["step"] for path in journals for event, _ in read_events(path) if event["event"] == "metrics"]


def stage_of(run: Run) -> int:
    """The process that works on the stage `count`."""
    wait_until(lambda: run.stored_state().stages["count"].pid is not None)
    pid = run.stored_state().stages["count"].pid
    assert pid is not None
    return pid


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.ci
@pytest.mark.parametrize("wakes", ["while its successor works", "after its successor is done"])
def test_a_stopped_driver_is_replaced_and_its_heir_alone_succeeds(store: Path, wakes: str) -> None:
    arguments = ("--step-s", "0.25", "--upto", "16", *SHORT)
    stopped = start(store, *arguments)
    try:
        (run,) = list_runs(open_storage(store))
        both = (stopped.pid, stage_of(run))
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)
        successor = subprocess.Popen([*SCRIPT, str(store), *arguments], stdout=subprocess.PIPE, text=True)
        assert successor.stdout is not None
        assert successor.stdout.readline().startswith("step"), "it works, though the other holds its journal open"
        if wakes == "while its successor works":
            for pid in both:
                os.kill(pid, signal.SIGCONT)
            code, said = finish(stopped)
        successor_code, successor_said = finish(successor)
        if wakes == "after its successor is done":
            for pid in both:
                os.kill(pid, signal.SIGCONT)
            code, said = finish(stopped)
    finally:
        stopped.kill()
    assert successor_code == 0, successor_said
    assert code == 75, said
    assert "RESUMABLE" in said
    assert "lost its hold" in said
    state = run.state()
    assert state.status is Status.SUCCEEDED
    assert state.stages["count"].status is Status.SUCCEEDED
    (artifact,) = (store / "artifacts" / "count").iterdir()
    record = read_record(counting_pipeline(open_storage(store), upto=16).plan()[0].artifact)
    assert record is not None
    assert record.lease_number == 2
    assert sorted(set(steps_told(run))) == list(range(16))
    # The stopped process may have been in the middle of a write, which it never finished: `bmojo gc` removes that.
    steps = [path.name for path in (artifact / "steps").iterdir() if not is_temporary(path.name)]
    assert len(steps) == 16
    assert run_here(open_storage(store), upto=16).status is Status.SUCCEEDED


@pytest.mark.ci
def test_what_the_stage_of_a_stopped_scheduler_finishes_is_used(store: Path) -> None:
    """The scheduler is stopped, the process of its stage works on: its successor waits for that, and wakes nobody."""
    arguments = ("--step-s", "0.4", "--upto", "16", *SHORT)
    stopped = start(store, *arguments)
    try:
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        successor = subprocess.run([*SCRIPT, str(store), *arguments], capture_output=True, text=True, timeout=120)
        assert successor.returncode == 0, successor.stdout + successor.stderr
        stopped.send_signal(signal.SIGCONT)
        assert finish(stopped)[0] == 75
    finally:
        stopped.kill()
    (run,) = list_runs(open_storage(store))
    assert run.state().status is Status.SUCCEEDED
    assert steps_told(run) == list(range(16)), "each once, by the one process"


def test_an_owner_that_lost_cannot_write_over_its_heirs_state_or_record(store: Path) -> None:
    storage = open_storage(store)
    result = run_here(storage)
    run, artifact = result.run, result.stages["count"].artifact
    record = read_record(artifact)
    assert record is not None
    owner = run.log(2)
    owner.append(Planned(event="resumed", info=run.info()))
    successor = run.log(3)
    with pytest.raises(LeaseLostError, match="took over"):
        owner.append(Ended(status=Status.SUCCEEDED))
    successor.append(Planned(event="resumed", info=run.info()))
    successor.append(Ended(status=Status.FAILED, error="no"))
    for _ in range(3):
        with pytest.raises(LeaseLostError, match="took over"):
            owner.append(Ended(status=Status.SUCCEEDED))
    assert run.state().status is Status.FAILED
    successors = record.model_copy(update={"lease_number": 7, "git_commit": "successor"})
    write_record(artifact, successors)
    for number in (1, 6):
        with pytest.raises(LeaseLostError, match="finished meanwhile by another process, under lease 7"):
            write_record(artifact, record.model_copy(update={"lease_number": number}))
    assert read_record(artifact) == successors


def test_a_request_to_cancel_is_for_one_owner_only(store: Path) -> None:
    storage = open_storage(store)
    pipeline = counting_pipeline(storage)
    run = pipeline.run_of(pipeline.plan())
    with Lease.acquire(storage, run.lease_relpath, "Run x") as lease:
        run.request_cancel()
        assert run.cancel_requested(lease.number)
        assert not run.cancel_requested(lease.number + 1)
    assert run_here(storage).status is Status.SUCCEEDED


class Gate:
    """A TCP proxy before the S3 server that can be shut: connections are then reset."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._shut = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        self._shut.set()
        for connection in self._open:
            connection.close()

    def open(self) -> None:
        self._shut.clear()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self._shut.is_set():
                client.close()
                continue
            server = socket.create_connection(self._target)
            self._open += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while not self._shut.is_set() and (data := source.recv(65536)):
                sink.sendall(data)
        except OSError:
            pass
        for connection in (source, sink):
            connection.close()


@pytest.fixture
def gate(s3_storage: Storage, s3_endpoint: str) -> Iterator[Gate]:
    gate = Gate(s3_endpoint)
    yield gate
    gate.close()


@pytest.mark.ci
@pytest.mark.parametrize(("outage_s", "ttl_s"), [(1.5, 20), pytest.param(8.0, 4, marks=pytest.mark.slow)])
def test_an_s3_outage_ends_with_one_owner(
    s3_storage: Storage, gate: Gate, tmp_path: Path, outage_s: float, ttl_s: float
) -> None:
    """A driver cut off for less than its lease goes on; one cut off for longer stops, and its successor finishes."""
    arguments = ("--step-s", "0.5", "--upto", "12", "--ttl-s", str(ttl_s), "--renew-s", "0.4")
    cut_off = start(
        s3_storage.url, *arguments, "--elsewhere", "machine-a",
        AWS_ENDPOINT_URL=gate.url, BMOJO_CACHE_DIR=str(tmp_path / "a"), BMOJO_STORAGE_RETRY_S="30",
    )  # fmt: skip
    try:
        gate.shut()
        time.sleep(outage_s)
        if outage_s > ttl_s:
            successor = subprocess.run(
                [*SCRIPT, s3_storage.url, *arguments, "--elsewhere", "machine-b"],
                env=os.environ | {"BMOJO_CACHE_DIR": str(tmp_path / "b")}, timeout=90, capture_output=True, text=True,
            )  # fmt: skip
            assert successor.returncode == 0, successor.stdout + successor.stderr
        gate.open()
        code, said = finish(cut_off, 90)
    finally:
        cut_off.kill()
    assert code == (75 if outage_s > ttl_s else 0), said
    assert ("lost its hold" in said) is (outage_s > ttl_s)
    (run,) = list_runs(s3_storage)
    assert run.state().status is Status.SUCCEEDED


@pytest.mark.ci
def test_running_a_finished_pipeline_again_keeps_when_it_really_ran(store: Path) -> None:
    storage = open_storage(store)
    first = run_here(storage).run.state()
    for _ in range(2):
        again = run_here(storage).run.state()
        assert (again.started_at, again.finished_at) == (first.started_at, first.finished_at)
        assert again.stages == first.stages
        assert again.checked_at is not None
        assert again.checked_at > (first.finished_at or "")
    code, said = bmojo("status", "--storage", str(store))
    assert code == 0
    assert "checked again at 20" in said
    assert "reused" not in said
    other = run_here(storage, scale=2.0).run.state()
    assert other.stages["count"].reused, "made by another run"
    assert not other.stages["sum"].reused


@pytest.mark.ci
def test_the_commands_on_a_live_driver(store: Path) -> None:
    driver = start(store, "--step-s", "0.3", "--upto", "200", "--renew-s", "0.3")
    at = ("--storage", str(store))
    try:
        code, said = bmojo("status", *at)
        assert code == 0
        assert "RUNNING" in said
        assert f"running now, by process {driver.pid}" in said
        assert "s so far" in said
        assert "RUNNING" in bmojo("list", *at)[1]
        code, said = bmojo("delete", "counting", "--yes", *at)
        assert code == 1
        assert "is running now" in said
        assert re.search(r"bmojo cancel counting-\w+ --storage", said)
        code, said = bmojo("unlock", "counting", "--yes", *at)
        assert code == 1
        assert f"held by process {driver.pid}" in said
        assert list_runs(open_storage(store))[0].holder() is not None
        code, said = bmojo("cancel", "counting", *at)
        assert code == 0
        assert f"Asked process {driver.pid}" in said
        assert finish(driver)[0] == 130
    finally:
        driver.kill()
    code, said = bmojo("status", *at)
    assert "CANCELLED" in said
    code, said = bmojo("cancel", "counting", *at)
    assert code == 1
    assert "is not running (CANCELLED)" in said
    assert "nothing to unlock" in bmojo("unlock", "counting", *at)[1]
    assert bmojo("delete", "counting", *at, answer="n\n")[0] == 1
    assert list_runs(open_storage(store))
    code, said = bmojo("delete", "counting", "--artifacts", "--yes", *at)
    assert code == 0
    assert list_runs(open_storage(store)) == []
    assert not list((store / "artifacts" / "count").iterdir())


@pytest.mark.ci
def test_a_dead_driver_of_another_machine_is_unlocked_by_hand(store: Path) -> None:
    driver = start(store, "--step-s", "0.2", "--upto", "100", "--renew-s", "0.5", "--elsewhere", "far-away")
    at = ("--storage", str(store))
    try:
        code, said = bmojo("unlock", "counting", "--yes", *at)
        assert code == 1, "it renews: it is alive"
        assert "on far-away" in said
        assert "on far-away" in bmojo("status", *at)[1]
    finally:
        stage = stage_of(list_runs(open_storage(store))[0])
        os.kill(stage, signal.SIGSTOP)  # else it lets go in order once its scheduler is gone
        driver.kill()
        driver.wait()
        os.kill(stage, signal.SIGKILL)
    assert bmojo("unlock", "counting", *at, answer="n\n")[0] == 1
    code, said = bmojo("unlock", "counting", "--yes", *at)
    assert code == 0, said
    assert said.count("Unlocked.") == 2, "the run and the artifact it was making"
    assert "RESUMABLE" in bmojo("status", *at)[1]
    waits: list[str] = []

    class Watching(Observer):
        def on_notice(self, text: str) -> None:
            waits.append(text)

        def on_stage_queued(self, stage: PlannedStage, reason: str) -> None:
            waits.append(stage.name)

    pipeline = counting_pipeline(open_storage(store), upto=100)
    assert run_pipeline(pipeline, nowhere(), NoCluster(), observer=Watching()).status is Status.SUCCEEDED
    assert not waits, "nobody had to be waited for"


@pytest.mark.ci
@pytest.mark.parametrize("offset_s", [-3600.0, 3600.0])
def test_a_driver_with_a_wrong_clock_is_shown_as_what_it_is(store: Path, offset_s: float) -> None:
    storage = open_storage(store)
    pipeline = counting_pipeline(storage, upto=400, step_s=0.05)
    run = pipeline.run_of(pipeline.plan())
    stop = threading.Event()

    def skew() -> None:
        """The lease file in force as another machine with a wrong clock would write it."""
        relpath = f"{run.lease_relpath}/000009.json"
        while not stop.wait(0.2):
            now = time.time() + offset_s
            owner = {"host": "far-away", "boot_id": "x", "pid": 1, "started_at": 1.0, "ray_job": None}
            info = {"owner": owner, "acquired_at": 1.0, "renewed_at": now, "expires_at": now + 60, "renew_s": 0.5}
            storage.write_bytes_atomic(relpath, json.dumps(info).encode())

    run_here(storage, upto=400)
    run.log(9).append(Planned(event="resumed", info=run.info()))
    thread = threading.Thread(target=skew)
    thread.start()
    try:
        wait_until(lambda: storage.exists(f"{run.lease_relpath}/000009.json"))
        assert run.state().status is Status.RUNNING
        assert "RUNNING" in bmojo("list", "--storage", str(store))[1]
        with pytest.raises(UserError, match="held by process 1 on far-away"):
            run_pipeline(pipeline, nowhere(), NoCluster())
    finally:
        stop.set()
        thread.join()
    state = run.state()
    assert state.status is Status.RESUMABLE
    assert state.error is not None
    assert "far-away, last seen at 20" in state.error


@pytest.mark.ci
@pytest.mark.parametrize(
    ("event", "content"),
    [
        ("000001-000001.json", "{"),
        ("000001-000003.json", "[]"),
        ("000001-000001.json", '{"status": "RUNNING"}'),
        ("000001-000003.json", "\x00\x01"),
    ],
)
def test_one_damaged_file_hides_no_other_run(store: Path, event: str, content: str) -> None:
    storage = open_storage(store)
    bad, good = run_here(storage).run, run_here(storage, scale=2.0).run
    file = Path(bad.url) / "events" / event
    file.write_text(content)
    code, said = bmojo("list", "--storage", str(store))
    assert code == 0
    assert re.search(rf"{bad.run_id} +damaged", said)
    assert re.search(rf"{good.run_id} +SUCCEEDED", said)
    assert file.name in said
    assert bmojo("status", good.run_id, "--storage", str(store))[0] == 0
    code, said = bmojo("status", bad.run_id, "--storage", str(store))
    assert code == 1
    assert str(file) in said
    assert run_here(storage).status is Status.SUCCEEDED, "running it again fixes it"
    code, said = bmojo("status", bad.run_id, "--storage", str(store))
    assert code == 0, said
    assert run_here(storage).status is Status.SUCCEEDED
    assert bad.stored_state().owners == 2, "the owners since the damage"

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.engine.lease import Lease, LeaseHeldError, LeaseLostError, lease_holder
from pipelines.engine.process import ProcessIdentity
from pipelines.engine.storage import Storage

HOLD = """
import sys, time
from pipelines.engine.lease import Lease
from pipelines.engine.storage import Storage
Lease.acquire(Storage(sys.argv[1]), "lease", "run x")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return request.getfixturevalue("s3_storage") if request.param == "s3" else Storage(tmp_path / "store")


def hold_elsewhere(storage: Storage) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_owner_is_refused_until_the_first_lets_go(storage: Storage) -> None:
    with Lease.acquire(storage, "lease", "Run x"):
        holder = lease_holder(storage, "lease")
        assert holder is not None
        assert holder.owner.pid == os.getpid()
        with pytest.raises(LeaseHeldError, match=rf"Run x is held by process {os.getpid()} on .*, since 20"):
            Lease.acquire(storage, "lease", "Run x")
    assert lease_holder(storage, "lease") is None
    Lease.acquire(storage, "lease", "Run x").release()
    assert len(storage.list("lease")) == 1


def test_a_killed_owner_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    process = hold_elsewhere(storage)
    with pytest.raises(LeaseHeldError, match=f"process {process.pid} on"):
        Lease.acquire(storage, "lease", "Run x")
    process.send_signal(signal.SIGKILL)
    while lease_holder(storage, "lease") is not None:  # a zombie, until it is waited for below, counts as dead
        time.sleep(0.01)
    started = time.monotonic()
    Lease.acquire(storage, "lease", "Run x").release()
    assert time.monotonic() - started < 2
    process.wait()


def test_of_many_heirs_of_a_dead_owner_one_wins(storage: Storage) -> None:
    process = hold_elsewhere(storage)
    process.kill()
    process.wait()
    won: list[Lease] = []

    def acquire() -> None:
        with contextlib.suppress(LeaseHeldError):
            won.append(Lease.acquire(storage, "lease", "Run x"))

    threads = [threading.Thread(target=acquire) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].release()


def forge(storage: Storage, **changes: object) -> None:
    """Make the lease in force that of another machine."""
    (name,) = storage.list("lease")
    info = storage.read_json(f"lease/{name}")
    info["owner"] |= {"host": "elsewhere", "boot_id": "another", "ray_job": "raysubmit_1"}
    storage.write_bytes_atomic(f"lease/{name}", json.dumps(info | changes).encode())


def test_the_hold_of_another_machine_is_taken_over_only_after_it_expired(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    Lease.acquire(storage, "lease", "Run x").release()
    forge(storage, released=False, expires_at=time.time() + 50)
    with pytest.raises(LeaseHeldError, match=r"on elsewhere, Ray job raysubmit_1.*by itself in \d+ s"):
        Lease.acquire(storage, "lease", "Run x")
    forge(storage, released=False, expires_at=time.time() - 1)
    Lease.acquire(storage, "lease", "Run x", renew_s=0.05).release()


def test_an_expired_hold_that_is_still_renewed_is_respected(tmp_path: Path) -> None:
    """The other machine's clock is behind ours."""
    storage = Storage(tmp_path)
    Lease.acquire(storage, "lease", "Run x").release()
    forge(storage, released=False, expires_at=time.time() - 1)
    timer = threading.Timer(0.1, forge, (storage,), {"released": False, "renewed_at": 5.0, "expires_at": 6.0})
    timer.start()
    with pytest.raises(LeaseHeldError):
        Lease.acquire(storage, "lease", "Run x", renew_s=0.3)
    timer.join()


def test_an_owner_that_slept_too_long_learns_that_it_lost(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    beats: list[bool] = []
    lease = Lease.acquire(storage, "lease", "Run x", renew_s=0.05)
    lease.on_beat(lambda: beats.append(lease.is_lost))
    storage.write_bytes_atomic("lease/000002.json", storage.read_bytes("lease/000001.json"))
    while not lease.is_lost:
        time.sleep(0.01)
    with pytest.raises(LeaseLostError, match="taken over"):
        lease.require()
    lease.release()
    assert beats[-1]
    assert lease_holder(storage, "lease") is not None, "the new owner's lease was touched"


def test_a_lease_is_renewed_and_survives_a_storage_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    lease = Lease.acquire(storage, "lease", "Run x", renew_s=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "list", lambda *_: (_ for _ in ()).throw(ConnectionError("away")))
        time.sleep(0.2)
    before = lease_holder(storage, "lease")
    time.sleep(0.2)
    after = lease_holder(storage, "lease")
    assert before is not None
    assert after is not None
    assert after.renewed_at > before.renewed_at
    lease.release()


def test_a_number_used_again_by_another_process_is_not_the_same_process() -> None:
    me = ProcessIdentity.of_this_process()
    assert not me.is_known_dead()
    assert me.model_copy(update={"started_at": me.started_at - 100}).is_known_dead()
    assert not me.model_copy(update={"host": "elsewhere", "pid": 2**22 + 5}).is_known_dead()

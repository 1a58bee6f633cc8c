from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from pipelines.engine.lease import (
    Clock,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    break_lease,
    configured_ttl_s,
    lease_holder,
    renewal_s,
)
from pipelines.engine.process import ProcessIdentity
from pipelines.storage import LocalStorage, Storage, open_storage
from tests.pipelines.waiting import wait_until

HOLD = """
import sys, time
from pipelines.engine.lease import Lease
from pipelines.storage import open_storage
Lease.acquire(open_storage(sys.argv[1]), "lease", "run x")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return request.getfixturevalue("s3_storage") if request.param == "s3" else open_storage(tmp_path / "store")


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
    storage = open_storage(tmp_path)
    process = hold_elsewhere(storage)
    with pytest.raises(LeaseHeldError, match=f"process {process.pid} on"):
        Lease.acquire(storage, "lease", "Run x")
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: lease_holder(storage, "lease") is None)  # a zombie, as it is until wait() below, counts as dead
    watched: list[float] = []
    Lease.acquire(storage, "lease", "Run x", on_watch=lambda _, wait_s: watched.append(wait_s)).release()
    assert not watched
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


class Simulation:
    """A clock that only sleeping moves; what is due meanwhile is done on the way. Wall clocks may be off."""

    def __init__(self, wall_offset_s: float = 0.0) -> None:
        self.now = 1000.0
        self.agenda: list[tuple[float, Callable[[], None]]] = []
        self.clock = self.with_wall(wall_offset_s)

    def with_wall(self, offset_s: float) -> Clock:
        return Clock(lambda: self.now, lambda: time.time() + self.now - 1000.0 + offset_s, self.sleep)

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while due := sorted((item for item in self.agenda if item[0] <= until), key=lambda item: item[0]):
            self.agenda.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1]()
        self.now = until


def elsewhere(patch: pytest.MonkeyPatch) -> None:
    """What is acquired from now on belongs to another machine."""
    other = ProcessIdentity.of_this_process().model_copy(update={"host": "elsewhere", "boot_id": "another"})
    patch.setattr(ProcessIdentity, "of_this_process", classmethod(lambda cls: other))


@pytest.mark.parametrize("offset_s", [-3600.0, -600.0, 0.0, 30.0, 3600.0])
def test_the_hold_of_another_machine_ends_after_its_file_was_watched_whatever_its_clock_says(
    tmp_path: Path, offset_s: float
) -> None:
    storage, simulation = open_storage(tmp_path), Simulation()
    with pytest.MonkeyPatch.context() as patch:
        elsewhere(patch)
        owner = Lease.acquire(storage, "lease", "Run x", clock=simulation.with_wall(offset_s), start=False)
    watched: list[float] = []
    successor = Lease.acquire(
        storage,
        "lease",
        "Run x",
        clock=simulation.clock,
        on_watch=lambda _, wait_s: watched.append(wait_s),
        start=False,
    )
    assert watched == [70.0], "60 s that it holds, and two renewals"
    assert simulation.now >= 1070.0
    assert successor.number == owner.number + 1
    with pytest.raises(LeaseLostError, match="did not renew it for 60 s"):
        owner.require()


@pytest.mark.parametrize("offset_s", [-3600.0, -600.0, -30.0, 30.0, 3600.0])
def test_a_live_owner_on_another_machine_is_seen_whatever_its_clock_says(tmp_path: Path, offset_s: float) -> None:
    storage, simulation = open_storage(tmp_path), Simulation()
    with pytest.MonkeyPatch.context() as patch:
        elsewhere(patch)
        owner = Lease.acquire(storage, "lease", "Run x", clock=simulation.with_wall(offset_s), start=False)
    for n in range(1, 40):
        simulation.agenda.append((1000.0 + 5 * n, owner.renew))
    assert lease_holder(storage, "lease", clock=simulation.clock) is not None
    for attempt in (Lease.acquire, break_lease):
        with pytest.raises(LeaseHeldError, match="on elsewhere"):
            attempt(storage, "lease", "Run x", clock=simulation.clock)
    owner.require()
    assert simulation.now < 1020.0, "a few seconds are enough to see life"


def test_a_dead_owner_on_another_machine_can_be_broken_by_hand(tmp_path: Path) -> None:
    storage, simulation = open_storage(tmp_path), Simulation()
    with pytest.MonkeyPatch.context() as patch:
        elsewhere(patch)
        owner = Lease.acquire(storage, "lease", "Run x", clock=simulation.with_wall(3600), start=False)
    assert lease_holder(storage, "lease", clock=simulation.clock) is None
    broken = break_lease(storage, "lease", "Run x", clock=simulation.clock)
    assert broken is not None
    assert broken.owner.host == "elsewhere"
    assert simulation.now <= 1020.0
    with pytest.raises(LeaseLostError, match="taken over"):
        owner.require_in_force()
    assert break_lease(storage, "lease", "Run x", clock=simulation.clock) is None
    Lease.acquire(storage, "lease", "Run x", clock=simulation.clock).release()


@settings(max_examples=60, deadline=None)
@given(
    renewals=st.lists(st.tuples(st.floats(0.5, 40), st.booleans()), max_size=12),
    pause=st.tuples(st.floats(0, 60), st.floats(0, 200)),
    offset_s=st.sampled_from([-3600.0, -60.0, 0.0, 7.0, 3600.0]),
    begins_s=st.floats(0, 100),
)
def test_no_two_owners_at_once_under_any_outage_pause_and_clock(
    tmp_path_factory: pytest.TempPathFactory,
    renewals: list[tuple[float, bool]],
    pause: tuple[float, float],
    offset_s: float,
    begins_s: float,
) -> None:
    """Whenever an successor gets the lease, the owner's require() already raises: it stopped before."""
    storage, simulation = open_storage(tmp_path_factory.mktemp("lease")), Simulation()
    with pytest.MonkeyPatch.context() as patch:
        elsewhere(patch)
        owner = Lease.acquire(storage, "lease", "Run x", clock=simulation.with_wall(offset_s), start=False)
    away = open_storage(tmp_path_factory.mktemp("away"))

    def attempt(reachable: bool) -> None:
        if pause[0] <= simulation.now - 1000.0 <= pause[0] + pause[1]:  # stopped: it happens when it goes on
            simulation.agenda.append((1000.0 + pause[0] + pause[1] + 0.01, lambda: attempt(reachable)))
            return
        owner._storage = storage if reachable else Broken(away.url)
        owner.renew()

    at = 1000.0
    for gap_s, reachable in renewals:
        at += gap_s
        simulation.agenda.append((at, lambda reachable=reachable: attempt(reachable)))
    simulation.sleep(begins_s)
    for _ in range(40):
        try:
            successor = Lease.acquire(storage, "lease", "Run x", clock=simulation.clock, start=False)
            break
        except LeaseHeldError:
            simulation.sleep(5.0)
    assert successor.number > owner.number
    with pytest.raises(LeaseLostError):
        owner.require()
    owner._storage = storage
    owner.renew()
    successor.require_in_force()


class Broken(LocalStorage):
    """A storage out of reach."""

    def list(self, relpath: str = "") -> list[str]:
        raise ConnectionError("away")


def test_an_owner_that_slept_too_long_learns_that_it_lost(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    beats: list[bool] = []
    lease = Lease.acquire(storage, "lease", "Run x", renew_s=0.05)
    lease.on_lost(lambda: beats.append(lease.is_lost))
    storage.write_bytes_atomic("lease/000002.json", storage.read_bytes("lease/000001.json"))
    wait_until(lambda: lease.is_lost)
    with pytest.raises(LeaseLostError, match="taken over"):
        lease.require()
    lease.release()
    assert beats[-1]
    assert lease_holder(storage, "lease") is not None, "the new owner's lease was touched"


def test_a_callback_that_fails_does_not_end_the_renewals(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    lease = Lease.acquire(storage, "lease", "Run x", renew_s=0.05)
    renewed_at: list[float] = []

    def fail() -> None:
        holder = lease_holder(storage, "lease")
        assert holder is not None
        renewed_at.append(holder.renewed_at)
        raise OSError("storage hiccup")

    lease.on_beat(fail)
    wait_until(lambda: len(renewed_at) > 5)
    lease.require()
    lease.release()
    assert renewed_at == sorted(set(renewed_at)), "every beat renewed it"


@pytest.mark.parametrize("kind", ["fails", "hangs"])
def test_an_owner_cut_off_stops_by_itself_before_others_may_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also if the storage hangs, so that the thread that renews can do nothing."""
    storage, simulation = open_storage(tmp_path), Simulation()
    lost, asked, release = threading.Event(), threading.Event(), threading.Event()
    lease = Lease.acquire(storage, "lease", "Run x", renew_s=0.05, clock=simulation.clock)
    lease.on_lost(lost.set)

    def away(*_: object) -> list[str]:
        asked.set()
        if kind == "hangs":
            release.wait()
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "list", away)
        assert asked.wait(60)
        lease.require()
        simulation.sleep(60)
        assert lost.wait(60)
        with pytest.raises(LeaseLostError, match="did not renew it for 60 s"):
            lease.require()
        release.set()
    lease.renew()
    with pytest.raises(LeaseLostError):
        lease.require()
    lease.release()


def test_a_lease_is_renewed_and_survives_a_storage_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    lease = Lease.acquire(storage, "lease", "Run x", renew_s=0.05)
    tries: list[object] = []

    def away(*arguments: object) -> list[str]:
        tries.append(arguments)
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "list", away)
        wait_until(lambda: len(tries) > 2)
    before = lease_holder(storage, "lease")
    assert before is not None

    def is_renewed() -> bool:
        now = lease_holder(storage, "lease")
        return now is not None and now.renewed_at > before.renewed_at

    wait_until(is_renewed)
    lease.release()


def test_a_number_used_again_by_another_process_is_not_the_same_process() -> None:
    me = ProcessIdentity.of_this_process()
    assert not me.is_known_dead()
    assert me.model_copy(update={"started_at": me.started_at - 100}).is_known_dead()
    assert not me.model_copy(update={"host": "elsewhere", "pid": 2**22 + 5}).is_known_dead()


def test_the_environment_may_shorten_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BMOJO_LEASE_TTL_S", raising=False)
    assert (configured_ttl_s(), renewal_s(configured_ttl_s())) == (60.0, 5.0)
    monkeypatch.setenv("BMOJO_LEASE_TTL_S", "8")
    assert (configured_ttl_s(), renewal_s(configured_ttl_s())) == (8.0, 0.8)


@pytest.mark.parametrize("value", ["soon", "0", "-5", "nan", "inf"])
def test_a_length_of_leases_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("BMOJO_LEASE_TTL_S", value)
    with pytest.raises(UserError, match=f"BMOJO_LEASE_TTL_S={value}: expected a number of seconds"):
        configured_ttl_s()

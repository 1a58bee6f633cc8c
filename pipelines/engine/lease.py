"""One owner at a time: a heartbeat lease kept in the storage (docs/design/0005).

A lease is a directory of numbered files, the highest number being the one in force. Only its owner rewrites a file;
whoever finds that the owner has let go, is dead, or has stopped renewing creates the next number, which only one of
several can do (Storage.create_exclusive). So there is no moment in which a crash leaves the lease unusable, and an
owner that was only slow sees a higher number and knows that it has lost.

No decision compares the clocks of two machines. An owner judges itself by its own monotonic clock: it has lost once
`ttl_s` have passed since it began its last successful renewal, whatever its threads or the storage did. Another machine
takes over only after it has watched the file stay the same for longer than that.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from base.errors import UserError
from pipelines.engine.process import ProcessIdentity
from pipelines.errors import InfrastructureError
from pipelines.storage import Storage

DEFAULT_TTL_S = 60.0
DEFAULT_RENEW_S = 5.0
_TTL_VARIABLE = "BMOJO_LEASE_TTL_S"
_PATIENCE = 0.5  # of ttl_s: how long the storage is tried where the owner needs the answer, so that it comes in time
_MAX_SKEW_S = 24 * 3600.0  # a clock that is further off would have broken TLS and logs long before

log = logging.getLogger(__name__)


def configured_ttl_s() -> float:
    """Seconds without a renewal after which an owner has lost: $BMOJO_LEASE_TTL_S, else 60. Raises UserError."""
    configured = os.environ.get(_TTL_VARIABLE)
    if not configured:
        return DEFAULT_TTL_S
    try:
        ttl_s = float(configured)
    except ValueError:
        ttl_s = math.nan
    if not 1.0 <= ttl_s <= _MAX_SKEW_S:
        raise UserError(
            f"{_TTL_VARIABLE}={configured}: expected a number of seconds, from 1 to {_MAX_SKEW_S:.0f}. Correct it, or "
            f"unset it for {DEFAULT_TTL_S:.0f}."
        )
    return ttl_s


def renewal_s(ttl_s: float) -> float:
    """Seconds between renewals of a lease of `ttl_s`: several must fail before it is lost."""
    return min(DEFAULT_RENEW_S, ttl_s / 10)


def _monotonic() -> float:
    """Seconds that also pass while the machine is suspended, where the system can tell."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


@dataclass(frozen=True)
class Clock:
    """The time, for tests to replace."""

    monotonic: Callable[[], float] = _monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()


class LeaseInfo(BaseModel):
    """What one lease file says. Times are seconds since the epoch, by the owner's clock."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: ProcessIdentity
    acquired_at: float
    renewed_at: float
    expires_at: float
    renew_s: float = DEFAULT_RENEW_S
    released: bool = False

    @property
    def ttl_s(self) -> float:
        """How long the owner holds it after a renewal."""
        return self.expires_at - self.renewed_at

    @property
    def last_seen(self) -> str:
        """When it was renewed, in words."""
        if self.owner.is_on_this_machine():
            return f"last seen {max(0.0, time.time() - self.renewed_at):.0f} s ago"
        return f"last seen at {_utc(self.renewed_at)} by its own clock"

    def __str__(self) -> str:
        return f"{self.owner}, since {_utc(self.acquired_at)}"


Watch = Callable[[LeaseInfo, float], None]
"""Called before a wait that finds out whether an owner still renews: the owner, and the seconds it takes at most."""


class LeaseHeldError(UserError):
    """Somebody else is the owner."""

    def __init__(self, what: str, holder: LeaseInfo, remedy: str = "") -> None:
        super().__init__(f"{what} is held by {holder}, {holder.last_seen}. {remedy or 'Wait for it, or cancel it.'}")
        self.holder = holder


class LeaseLostError(InfrastructureError):
    """The lease ended while it was needed: it was not renewed in time, or another process took it."""


class Lease:
    """The right to work on something, kept by a thread that renews it until release().

    A second thread looks at the clock alone, so that neither a storage that hangs nor a callback keeps the owner from
    learning in time that it has lost.

    Example: `with Lease.acquire(storage, "runs/x/lease", "run x") as lease: ...`
    """

    def __init__(
        self,
        storage: Storage,
        relpath: str,
        number: int,
        info: LeaseInfo,
        began_at: float,
        clock: Clock = CLOCK,
    ) -> None:
        """`began_at` is the monotonic time at which the lease began to be written."""
        self._patient = storage.with_retry_s(_PATIENCE * info.ttl_s)
        self._storage = storage.with_retry_s(0)  # of renewals: the next one is due soon
        self._relpath, self._info, self._clock = relpath, info, clock
        self.number = number  # higher than that of every owner before
        self._ttl_s, self._renew_s = info.ttl_s, info.renew_s
        self._renewed_at = began_at
        self._stopped = threading.Event()
        self._lost_by: str | None = None
        self._lost_lock = threading.Lock()
        self._on_beat: list[Callable[[], None]] = []
        self._on_lost: list[Callable[[], None]] = []
        self._renewer = threading.Thread(target=self._keep_renewing, name=f"lease {relpath}", daemon=True)
        self._watchdog = threading.Thread(target=self._watch_clock, name=f"lease clock {relpath}", daemon=True)

    @classmethod
    def acquire(
        cls,
        storage: Storage,
        relpath: str,
        what: str,
        ttl_s: float = DEFAULT_TTL_S,
        renew_s: float = DEFAULT_RENEW_S,
        *,
        remedy: str = "",
        on_watch: Watch | None = None,
        clock: Clock = CLOCK,
        start: bool = True,
    ) -> Lease:
        """Become the owner of the lease directory `relpath`; `what` names it and `remedy` says what to do in messages.

        The hold of a dead process of this machine is taken over at once. That of a process of another machine, which
        nobody here can ask, is taken over after its file has been watched to stay the same for its `ttl_s` and two
        renewals more. `start=False` leaves the threads out: the caller calls renew().
        Raises: LeaseHeldError: another process is the owner.
        """
        owner = ProcessIdentity.of_this_process()
        while True:
            number, holder = _current(storage, relpath)
            if holder is not None:
                _require_over(storage, relpath, what, number, holder, remedy, on_watch, clock)
            began_at, now = clock.monotonic(), clock.wall()
            info = LeaseInfo(owner=owner, acquired_at=now, renewed_at=now, expires_at=now + ttl_s, renew_s=renew_s)
            lease = cls(storage, relpath, number + 1, info, began_at, clock)
            if lease._patient.create_exclusive(_file(relpath, number + 1), _encode(info)):
                break
        if not lease._is_in_force(lease._patient):  # without conditional puts two get through: the last writer stays
            raise LeaseHeldError(what, _current(storage, relpath)[1] or info, remedy)
        for old in _numbers(storage, relpath):
            if old <= number:
                storage.delete(_file(relpath, old))
        if start:
            lease._renewer.start()
            lease._watchdog.start()
        return lease

    @property
    def owner(self) -> ProcessIdentity:
        """Who holds it."""
        return self._info.owner

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken over, or may: this one has not renewed in time."""
        return self._lost_by is not None or self._left_s() <= 0

    def require(self) -> None:
        """Raises LeaseLostError where another process has taken over, or may have."""
        if not self.is_lost:
            return
        reason = self._lost_by or self._late()
        raise LeaseLostError(
            f"This process lost its hold of {self._patient.url_of(self._relpath)}: {reason}. It stops here and writes "
            "nothing more; whoever took over goes on, else the same command resumes."
        )

    def require_in_force(self) -> None:
        """As require(), after a look into the storage: call it right before something that cannot be undone."""
        self.require()
        if not self._is_in_force(self._patient):
            self._lose(self._taken_over())
        self.require()

    def on_beat(self, callback: Callable[[], None]) -> None:
        """Have `callback` called in the lease's thread after every attempt to renew. What it raises is logged."""
        self._on_beat.append(callback)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once, in a thread of the lease, when the lease is found lost."""
        self._on_lost.append(callback)

    def renew(self) -> None:
        """Renew it once, or find that it is lost. Does not raise: the storage may come back before it expires."""
        if self.is_lost:
            self._lose(self._late())
            return
        began_at = self._clock.monotonic()
        try:
            if not self._is_in_force(self._storage):
                self._lose(self._taken_over())
                return
            now = self._clock.wall()
            renewed = {"renewed_at": now, "expires_at": now + self._ttl_s}
            self._write(self._storage, self._info.model_copy(update=renewed))
            self._renewed_at = began_at
        except Exception as error:
            log.warning("Could not renew %s: %s", self._relpath, error)

    def release(self) -> None:
        """Stop renewing and let others take it. Does not raise: with the storage out of reach, the lease expires."""
        if not self.stop():
            log.warning("Could not release %s: its last renewal hangs. It expires by itself.", self._relpath)
        elif self._lost_by != self._taken_over():
            try:
                if self._is_in_force(self._patient):
                    self._write(self._patient, self._info.model_copy(update={"released": True}))
            except Exception as error:
                log.warning("Could not release %s: %s. It expires by itself.", self._relpath, error)

    def stop(self) -> bool:
        """Stop renewing and leave the file as it is. Returns whether the threads have ended."""
        self._stopped.set()
        for thread in (self._watchdog, self._renewer):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout=2 * self._renew_s + 1)
        return not self._renewer.is_alive() or self._renewer is threading.current_thread()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _keep_renewing(self) -> None:
        while not self._stopped.wait(self._renew_s) and self._lost_by is None:
            self.renew()
            _call_all(self._on_beat)

    def _watch_clock(self) -> None:
        while not self._stopped.wait(min(self._renew_s, max(0.01, self._left_s()))):
            if self.is_lost:
                self._lose(self._late())
                return

    def _lose(self, reason: str) -> None:
        with self._lost_lock:
            if self._lost_by is not None:
                return
            self._lost_by = reason
        _call_all(self._on_lost)

    def _left_s(self) -> float:
        return self._renewed_at + self._ttl_s - self._clock.monotonic()

    def _late(self) -> str:
        return f"it did not renew it for {self._ttl_s:.0f} s (stopped, asleep, or the storage out of reach)"

    def _taken_over(self) -> str:
        return "it was taken over by another process"

    def _is_in_force(self, storage: Storage) -> bool:
        number, info = _current(storage, self._relpath)
        mine = (self._info.owner, self._info.acquired_at)
        return number == self.number and info is not None and (info.owner, info.acquired_at) == mine

    def _write(self, storage: Storage, info: LeaseInfo) -> None:
        storage.write_bytes_atomic(_file(self._relpath, self.number), _encode(info))
        self._info = info


def lease_holder(
    storage: Storage, relpath: str, on_watch: Watch | None = None, clock: Clock = CLOCK
) -> LeaseInfo | None:
    """The driver that works under the lease now, as far as can be seen; None if there is none.

    Where the file alone does not tell (another machine whose clock may be wrong), it is watched for some seconds.
    """
    number, info = _current(storage, relpath)
    if info is None or _is_over(info):
        return None
    age_s = clock.wall() - info.renewed_at
    if abs(age_s) < info.ttl_s:
        return info
    if abs(age_s) > _MAX_SKEW_S:
        return None
    return _seen_renewing(storage, relpath, number, info, info.renew_s + 2.0, on_watch, clock)


def last_holder(storage: Storage, relpath: str) -> tuple[int, LeaseInfo | None]:
    """The number and the file of the last owner, at work or not; (0, None) where there never was one."""
    return _current(storage, relpath)


def break_lease(
    storage: Storage, relpath: str, what: str, remedy: str = "", on_watch: Watch | None = None, clock: Clock = CLOCK
) -> LeaseInfo | None:
    """Take the lease from an owner that does not renew it, for nobody. Returns that owner; None where there was none.

    An owner that is only cut off finds a higher number when it comes back, and stops.
    Raises: LeaseHeldError: the owner is alive.
    """
    number, holder = _current(storage, relpath)
    if holder is None or holder.released:
        return None
    if not holder.owner.is_known_dead():
        if holder.owner.is_on_this_machine() and clock.wall() < holder.expires_at:
            raise LeaseHeldError(what, holder, remedy)
        alive = _seen_renewing(storage, relpath, number, holder, 2 * holder.renew_s, on_watch, clock)
        if alive is not None:
            raise LeaseHeldError(what, alive, remedy)
    now = clock.wall()
    nobody = LeaseInfo(
        owner=ProcessIdentity.of_this_process(), acquired_at=now, renewed_at=now, expires_at=now, released=True
    )
    if not storage.create_exclusive(_file(relpath, number + 1), _encode(nobody)):
        raise LeaseHeldError(what, _current(storage, relpath)[1] or holder, remedy)
    return holder


def _is_over(info: LeaseInfo) -> bool:
    return info.released or info.owner.is_known_dead()


def _require_over(
    storage: Storage,
    relpath: str,
    what: str,
    number: int,
    holder: LeaseInfo,
    remedy: str,
    on_watch: Watch | None,
    clock: Clock,
) -> None:
    if _is_over(holder):
        return
    wait_s = 2 * holder.renew_s
    if not holder.owner.is_on_this_machine():
        wait_s += holder.ttl_s
    elif clock.wall() < holder.expires_at:  # one machine, one clock
        raise LeaseHeldError(what, holder, remedy)
    alive = _seen_renewing(storage, relpath, number, holder, wait_s, on_watch, clock)
    if alive is not None:
        raise LeaseHeldError(what, alive, remedy)


def _seen_renewing(
    storage: Storage,
    relpath: str,
    number: int,
    info: LeaseInfo,
    wait_s: float,
    on_watch: Watch | None,
    clock: Clock,
) -> LeaseInfo | None:
    """Watch a lease file for `wait_s`. Returns what it says once it has changed; None where nothing did, or the owner
    let go."""
    if on_watch is not None:
        on_watch(info, wait_s)
    until = clock.monotonic() + wait_s
    while clock.monotonic() < until:
        clock.sleep(max(0.01, min(1.0, info.renew_s / 2, until - clock.monotonic())))
        now_number, now = _current(storage, relpath)
        if now is not None and (now_number, now) != (number, info):
            return None if _is_over(now) else now
    return None


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception as error:
            log.warning("A callback of a lease failed: %s", error)


def _current(storage: Storage, relpath: str) -> tuple[int, LeaseInfo | None]:
    """The highest number (0: there is none) and what its file says (None: it has no sense or has just gone)."""
    numbers = _numbers(storage, relpath)
    if not numbers:
        return 0, None
    try:
        return numbers[-1], LeaseInfo.model_validate_json(storage.read_bytes(_file(relpath, numbers[-1])))
    except (FileNotFoundError, ValidationError):
        return numbers[-1], None


def _numbers(storage: Storage, relpath: str) -> list[int]:
    return sorted(
        int(name.removesuffix(".json")) for name in storage.list(relpath) if name.removesuffix(".json").isdigit()
    )


def _file(relpath: str, number: int) -> str:
    return f"{relpath}/{number:06d}.json"


def _encode(info: LeaseInfo) -> bytes:
    return json.dumps(info.model_dump(mode="json")).encode()


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

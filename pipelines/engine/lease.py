"""One owner at a time: a heartbeat lease kept in the storage.

A lease is a directory of numbered files, the highest number being the one in force. Only its owner rewrites a file;
whoever finds that the owner has let go, is dead, or has stopped renewing creates the next number, which only one of
several can do (Storage.create_exclusive). So there is no moment in which a crash leaves the lease unusable, and an
owner that was only slow sees a higher number and knows that it has lost.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.engine.process import ProcessIdentity
from pipelines.engine.storage import Storage
from pipelines.errors import InfrastructureError, UserError

DEFAULT_TTL_S = 60.0
DEFAULT_RENEW_S = 5.0

log = logging.getLogger(__name__)


class LeaseInfo(BaseModel):
    """What one lease file says. Times are seconds since the epoch, by the owner's clock."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: ProcessIdentity
    acquired_at: float
    renewed_at: float
    expires_at: float
    released: bool = False

    @property
    def is_live(self) -> bool:
        """Whether the owner must be taken to be at work."""
        return not self.released and time.time() < self.expires_at and not self.owner.is_known_dead()

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.acquired_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"{self.owner}, since {since}"


class LeaseHeldError(UserError):
    """Somebody else is the owner."""

    def __init__(self, what: str, holder: LeaseInfo) -> None:
        left_s = max(0.0, holder.expires_at - time.time())
        super().__init__(
            f"{what} is held by {holder}, last seen {time.time() - holder.renewed_at:.0f} s ago. Wait for it, or "
            f"cancel it; if that process is gone, its hold ends by itself in {left_s:.0f} s."
        )
        self.holder = holder


class LeaseLostError(InfrastructureError):
    """The lease ended while it was needed: it was not renewed in time and another process took it."""


class Lease:
    """The right to work on something, kept by a thread that renews it until release().

    Example: `with Lease.acquire(storage, "runs/x/lease", "run x") as lease: ...`
    """

    def __init__(
        self, storage: Storage, relpath: str, number: int, info: LeaseInfo, ttl_s: float, renew_s: float
    ) -> None:
        self._storage, self._relpath, self._number = storage, relpath, number
        self._info, self._ttl_s, self._renew_s = info, ttl_s, renew_s
        self._stopped = threading.Event()
        self._lost = threading.Event()
        self._on_beat: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._beat, name=f"lease {relpath}", daemon=True)

    @classmethod
    def acquire(
        cls, storage: Storage, relpath: str, what: str, ttl_s: float = DEFAULT_TTL_S, renew_s: float = DEFAULT_RENEW_S
    ) -> Lease:
        """Become the owner of the lease directory `relpath`; `what` names it in messages.

        The hold of a dead process of this machine is taken over at once. That of a process of another machine is taken
        over once it has expired and stays silent for a while longer, should the machines' clocks differ.
        Raises: LeaseHeldError: another process is the owner.
        """
        owner = ProcessIdentity.of_this_process()
        while True:
            number, holder = _current(storage, relpath)
            if holder is not None:
                _require_over(storage, relpath, what, number, holder, renew_s)
            now = time.time()
            info = LeaseInfo(owner=owner, acquired_at=now, renewed_at=now, expires_at=now + ttl_s)
            if storage.create_exclusive(_file(relpath, number + 1), _encode(info)):
                break
        lease = cls(storage, relpath, number + 1, info, ttl_s, renew_s)
        if not lease._is_in_force():  # a store without conditional puts let two through: the last writer stays
            raise LeaseHeldError(what, _current(storage, relpath)[1] or info)
        for old in _numbers(storage, relpath):
            if old <= number:
                storage.delete(_file(relpath, old))
        lease._thread.start()
        return lease

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken over."""
        return self._lost.is_set()

    def require(self) -> None:
        """Raises LeaseLostError where another process has taken over."""
        if self.is_lost:
            raise LeaseLostError(
                f"{self._storage.url_of(self._relpath)} was taken over by another process because this one did not "
                f"renew it for {self._ttl_s:.0f} s (asleep, or the storage out of reach)."
            )

    def on_beat(self, callback: Callable[[], None]) -> None:
        """Have `callback` called in the lease's thread at every renewal, and once when the lease is found lost."""
        self._on_beat.append(callback)

    def release(self) -> None:
        """Stop renewing and let others take it. Does not raise where the storage is out of reach: the lease then "
        "expires."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        if not self.is_lost:
            try:
                self._write(self._info.model_copy(update={"released": True}))
            except Exception as error:
                log.warning("Could not release %s: %s. It expires by itself.", self._relpath, error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stopped.wait(self._renew_s):
            try:
                if not self._is_in_force():
                    self._lost.set()
                else:
                    now = time.time()
                    self._write(self._info.model_copy(update={"renewed_at": now, "expires_at": now + self._ttl_s}))
            except Exception as error:  # the storage may come back before the lease expires
                log.warning("Could not renew %s: %s", self._relpath, error)
            for callback in self._on_beat:
                callback()
            if self.is_lost:
                return

    def _is_in_force(self) -> bool:
        number, info = _current(self._storage, self._relpath)
        mine = (self._info.owner, self._info.acquired_at)
        return number == self._number and info is not None and (info.owner, info.acquired_at) == mine

    def _write(self, info: LeaseInfo) -> None:
        self._storage.write_bytes_atomic(_file(self._relpath, self._number), _encode(info))
        self._info = info


def lease_holder(storage: Storage, relpath: str) -> LeaseInfo | None:
    """Who owns the lease now; None where nobody who lives does."""
    _, info = _current(storage, relpath)
    return info if info is not None and info.is_live else None


def _require_over(storage: Storage, relpath: str, what: str, number: int, holder: LeaseInfo, renew_s: float) -> None:
    if holder.is_live:
        raise LeaseHeldError(what, holder)
    if holder.released or holder.owner.is_known_dead():
        return
    time.sleep(2 * renew_s)
    now_number, now_holder = _current(storage, relpath)
    if now_holder is not None and (now_number, now_holder.renewed_at) != (number, holder.renewed_at):
        raise LeaseHeldError(what, now_holder)


def _current(storage: Storage, relpath: str) -> tuple[int, LeaseInfo | None]:
    """The highest number (0 where there is none) and what its file says (None where it has no sense or has just "
    "gone)."""
    numbers = _numbers(storage, relpath)
    if not numbers:
        return 0, None
    try:
        return numbers[-1], LeaseInfo.model_validate(storage.read_json(_file(relpath, numbers[-1])))
    except (FileNotFoundError, ValidationError, UserError):
        return numbers[-1], None


def _numbers(storage: Storage, relpath: str) -> list[int]:
    return sorted(
        int(name.removesuffix(".json")) for name in storage.list(relpath) if name.removesuffix(".json").isdigit()
    )


def _file(relpath: str, number: int) -> str:
    return f"{relpath}/{number:06d}.json"


def _encode(info: LeaseInfo) -> bytes:
    return json.dumps(info.model_dump(mode="json")).encode()

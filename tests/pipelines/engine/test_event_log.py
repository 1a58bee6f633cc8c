"""The event log: whatever owners do and however their calls mix, the history is one line that nobody can bend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DamagedError
from pipelines.engine.event_log import EventLog, Position, positions, read_events
from pipelines.engine.events import Queued, Sealed
from pipelines.engine.lease import LeaseLostError
from pipelines.errors import InfrastructureError
from pipelines.storage import Storage, open_storage

LOG = "runs/x/events"


class Said(NamedTuple):
    """An event that an owner believes to have appended."""

    owner: int
    number: int


class Mixed:
    """A storage in which something else may happen before every call."""

    def __init__(self, storage: Storage, meanwhile: Callable[[], None]) -> None:
        self._storage, self._meanwhile = storage, meanwhile
        self._is_busy = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._storage, name)
        if name == "url_of":
            return method

        def call(*arguments: Any) -> Any:
            if not self._is_busy:
                self._is_busy = True
                try:
                    self._meanwhile()
                finally:
                    self._is_busy = False
            return method(*arguments)

        return call


class Owners:
    """Owners with increasing numbers, who append, are stopped, and come back."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.logs: dict[int, EventLog] = {}
        self.said: list[Said] = []  # in the order in which the calls returned
        self.lost: set[int] = set()
        self._last = self._count = 0
        self._appending: int | None = None

    def begin(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """The next owner seals those before it, while something else happens; then it may append."""
        self._last += 1
        number = self._last
        self.logs[number] = EventLog(cast(Storage, Mixed(self.storage, meanwhile)), LOG, number)

    def append(self, number: int) -> None:
        if number == self._appending:  # a log has one writer at a time
            return
        self._count += 1
        said, outer, self._appending = Said(number, self._count), self._appending, number
        had_lost = number in self.lost
        try:
            self.logs[number].append(Queued(stage=str(said.owner), reason=str(said.number)))
        except LeaseLostError:
            self.lost.add(number)
        else:
            assert not had_lost, "an owner that had lost appended again"
            self.said.append(said)
        finally:
            self._appending = outer

    def someone(self, choice: int) -> None:
        if self.logs:
            self.append(sorted(self.logs)[choice % len(self.logs)])

    def check(self) -> None:
        entries = read_events(self.storage, LOG)
        told = [Said(int(e.event.stage), int(e.event.reason)) for e in entries if isinstance(e.event, Queued)]
        assert told == self.said, "the history is what was said, in the order in which it was said"
        assert [said.owner for said in told] == sorted(said.owner for said in told), "one owner after the other"
        by_owner: dict[int, list[Any]] = {}
        for position, event in entries:
            by_owner.setdefault(position.owner, []).append(event)
            assert position.sequence == len(by_owner[position.owner]), "no gap"
        for owner, events in by_owner.items():
            first_seal = next((n for n, event in enumerate(events) if isinstance(event, Sealed)), len(events))
            assert all(isinstance(event, Sealed) for event in events[first_seal:]), "only seals follow a seal"
            assert isinstance(events[-1], Sealed) or owner == max(self.logs), "only the last owner is not sealed"
        for owner in sorted(self.logs)[:-1]:
            self.append(owner)
            assert owner in self.lost


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return request.getfixturevalue("s3_storage") if request.param == "s3" else open_storage(tmp_path / "store")


Step = tuple[str, list[int]]
STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(st.sampled_from(["append", "append", "begin"]), st.lists(st.integers(-1, 5), min_size=1, max_size=6)),
    max_size=15,
)


def play(storage: Storage, steps: list[Step]) -> None:
    """Each step appends as one of the owners, or begins the next one, with others' calls in between (-1: a begin)."""
    owners = Owners(storage)
    for what, choices in [("begin", [0]), *steps]:
        waiting = list(choices)

        def meanwhile(waiting: list[int] = waiting) -> None:
            if waiting:
                choice = waiting.pop()
                owners.begin() if choice < 0 else owners.someone(choice)

        if what == "begin":
            owners.begin(meanwhile)
        else:
            owners.someone(choices[0])
    owners.check()


@given(steps=STEPS)
@settings(max_examples=40, deadline=None)
def test_any_mixture_of_owners_leaves_one_line(tmp_path_factory: pytest.TempPathFactory, steps: list[Step]) -> None:
    play(open_storage(tmp_path_factory.mktemp("log")), steps)


def test_any_mixture_of_owners_leaves_one_line_on_s3(s3_storage: Storage) -> None:
    counter = iter(range(100))

    @given(steps=STEPS)
    @settings(max_examples=6, deadline=None, database=None)
    def check(steps: list[Step]) -> None:
        play(open_storage(f"{s3_storage.url}/{next(counter)}"), steps)

    check()


def test_an_owner_that_appends_while_it_is_sealed_keeps_what_it_said(storage: Storage) -> None:
    """Two threads: one appends without end, the other takes over."""
    owners = Owners(storage)
    owners.begin()
    started = threading.Event()

    def append() -> None:
        while 1 not in owners.lost:
            owners.append(1)
            started.set()
            time.sleep(0.05)

    thread = threading.Thread(target=append)
    thread.start()
    started.wait()
    owners.begin()
    thread.join()
    owners.append(2)
    owners.check()


def test_a_seal_needs_no_event_before_it(storage: Storage) -> None:
    """An owner that was stopped before its first event finds its first number taken."""
    EventLog(storage, LOG, 3)
    assert positions(storage, LOG) == [Position(1, 1), Position(2, 1)]
    with pytest.raises(LeaseLostError, match="took over"):
        EventLog(storage, LOG, 2).append(Queued(stage="a", reason="late"))


@pytest.mark.parametrize("number", [1, 2])
def test_an_append_that_was_cut_off_is_no_loss_of_the_log(tmp_path: Path, number: int) -> None:
    """A signal or a lost answer after the event was created: the owner goes on behind it."""
    storage = open_storage(tmp_path)

    class CutOff(Mixed):
        def create_exclusive(self, relpath: str, data: bytes) -> bool:
            created = storage.create_exclusive(relpath, data)
            if b"interrupted" in data and created:
                raise InfrastructureError("no answer")
            return created

    log = EventLog(cast(Storage, CutOff(storage, lambda: None)), LOG, number)
    log.append(Queued(stage="a", reason="first"))
    with pytest.raises(InfrastructureError):
        log.append(Queued(stage="a", reason="interrupted"))
    log.append(Queued(stage="a", reason="last"))
    told = [event.reason for _, event in read_events(storage, LOG) if isinstance(event, Queued)]
    assert told == ["first", "interrupted", "last"]
    EventLog(storage, LOG, number + 1)
    with pytest.raises(LeaseLostError, match="took over"):
        log.append(Queued(stage="a", reason="too late"))


def test_only_what_is_behind_a_place_is_read(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    first = EventLog(storage, LOG, 1)
    for number in range(3):
        first.append(Queued(stage="a", reason=str(number)))
    EventLog(storage, LOG, 2).append(Queued(stage="b", reason="3"))
    places = [entry.position for entry in read_events(storage, LOG)]
    assert places == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1)]
    for index, place in enumerate(places):
        assert [entry.position for entry in read_events(storage, LOG, place)] == places[index + 1 :]


def test_a_million_events_stay_in_order(tmp_path: Path) -> None:
    """Numbers outgrow their six digits: order is by number, not by name."""
    storage = open_storage(tmp_path)
    for name in ("000001-999999.json", "000001-1000000.json", "000001-000002.json", "notes.txt", "1-1.json"):
        storage.write_bytes_atomic(f"{LOG}/{name}", b"")
    assert [place.sequence for place in positions(storage, LOG)] == [2, 999999, 1000000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ""),
        (b'{"event": "queued"', ""),
        (b"\x00\xff", ""),
        (b"[1]", ""),
        (None, "'dreamt'"),
    ],
)
def test_an_event_that_is_not_as_written_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    storage = open_storage(tmp_path)
    log = EventLog(storage, LOG, 1)
    for number in range(3):
        log.append(Queued(stage="a", reason=str(number)))
    file = f"{LOG}/000001-000002.json"
    if content is None:
        storage.write_json_atomic(file, {"event": "dreamt", "at": "", "stage": "a"})
    else:
        storage.write_bytes_atomic(file, content)
    with pytest.raises(DamagedError, match=r"000001-000002\.json.*" + reason):
        read_events(storage, LOG)
    assert len(read_events(storage, LOG, Position(1, 2))) == 1
    successor = EventLog(storage, LOG, 2)  # whose log does not depend on what came before
    successor.append(Queued(stage="a", reason="goes on"))
    with pytest.raises(LeaseLostError, match="took over"):
        log.append(Queued(stage="a", reason="lost"))


def test_one_flipped_bit_is_seen(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    EventLog(storage, LOG, 1).append(Queued(stage="a", reason="1"))
    file = f"{LOG}/000001-000001.json"
    data = bytearray(storage.read_bytes(file))
    data[data.index(b'"1"') + 1] ^= 1
    storage.write_bytes_atomic(file, bytes(data))
    with pytest.raises(DamagedError, match=r"000001-000001\.json"):
        read_events(storage, LOG)


def test_a_damaged_last_event_ends_no_log(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    log = EventLog(storage, LOG, 1)
    log.append(Queued(stage="a", reason="1"))
    storage.write_bytes_atomic(f"{LOG}/000001-000001.json", b"{")
    EventLog(storage, LOG, 2)
    assert positions(storage, LOG) == [(1, 1), (1, 2)], "sealed behind it"
    with pytest.raises(LeaseLostError, match="took over"):
        log.append(Queued(stage="a", reason="2"))

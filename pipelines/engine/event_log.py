"""The append-only, fenced log of a run: <run directory>/events/<lease number>-<sequence number>.json.

Every event is created exclusively under the next number of its owner, so none is ever overwritten. A successor first
seals the logs of those before it: it creates the next event in their name. An owner that was stopped or cut off then
finds its next number taken, whenever it wakes, and knows that it has lost: it cannot append. This needs no clock and
no look at the lease, only exclusive creation (docs/design/0005).
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from base.errors import DamagedError
from pipelines.engine.events import Event, Planned, Sealed
from pipelines.engine.lease import LeaseLostError
from pipelines.storage import Storage
from pipelines.storage.storage import encode_json

_NAME = re.compile(r"(\d{6,})-(\d{6,})\.json")
_READERS = 16
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


class Position(NamedTuple):
    """An event's place in the history: its owner's lease number, and its own number from 1."""

    owner: int
    sequence: int


_START = Position(0, 0)


class Entry(NamedTuple):
    """An event and its place."""

    position: Position
    event: Event


class EventLog:
    """The log as its owner appends to it. One writer at a time, in one thread."""

    def __init__(self, storage: Storage, relpath: str, owner: int) -> None:
        """Become the only writer: seal what the owners before `owner` (a lease number) wrote or could still write."""
        self._storage, self._relpath, self._owner = storage, relpath, owner
        self._sequence = 0
        self._seal_predecessors()

    def append(self, event: Event) -> None:
        """Add an event; it is durable when this returns. Raises LeaseLostError: a successor has sealed this log."""
        while not self._create(place := Position(self._owner, self._sequence + 1), event):
            if isinstance(self._read_or_none(place), Sealed | None):
                raise LeaseLostError(
                    f"Another process took over {self._storage.url_of(self._relpath)}. This one stops here and writes "
                    "nothing more; its successor goes on, else the same command resumes."
                )
            self._sequence += 1  # ours: a signal or a lost answer cut that append off once the event was there
        self._sequence += 1

    def _seal_predecessors(self) -> None:
        last: dict[int, int] = {}
        for owner, sequence in positions(self._storage, self._relpath):
            last[owner] = max(last.get(owner, 0), sequence)
        # Owners seal from the oldest on, so all below one that is sealed are sealed.
        unsealed: list[int] = []
        for owner in range(self._owner - 1, 0, -1):
            if owner in last and isinstance(self._read_or_none(Position(owner, last[owner])), Sealed):
                break
            unsealed.append(owner)
        for owner in reversed(unsealed):
            self._seal(owner, last.get(owner, 0) + 1)

    def _seal(self, owner: int, sequence: int) -> None:
        while not self._create(Position(owner, sequence), Sealed(by=self._owner)):
            sequence += 1  # it was still appending

    def _read_or_none(self, position: Position) -> Event | None:
        """None if it is damaged: it ends no log."""
        try:
            return read_event(self._storage, self._relpath, position)
        except DamagedError:
            return None

    def _create(self, position: Position, event: Event) -> bool:
        data = encode_json(event.model_dump(mode="json"))
        return self._storage.create_exclusive(_file(self._relpath, position), data)


def positions(storage: Storage, relpath: str) -> list[Position]:
    """Places of all events there are, in order."""
    found = (_NAME.fullmatch(name) for name in storage.list(relpath))
    return sorted(Position(int(match[1]), int(match[2])) for match in found if match)


def read_event(storage: Storage, relpath: str, position: Position) -> Event:
    """One event. Raises DamagedError: it is not as it was written, or of another version of this program."""
    file = _file(relpath, position)
    try:
        return _ADAPTER.validate_python(storage.read_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        raise DamagedError(
            f"{storage.url_of(file)} is damaged, or another version of this program wrote it: "
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}."
        ) from error


def read_events(storage: Storage, relpath: str, after: Position = _START) -> list[Entry]:
    """All events behind a place, in order. Raises DamagedError as read_event."""
    return [Entry(position, _sound(event)) for position, event in _read_all(storage, relpath, after)]


def read_history(storage: Storage, relpath: str) -> list[Entry]:
    """The events that tell how far the run is, in order: all; where one is damaged, those since it was planned again.

    An owner that finds a damaged event begins a new history (an event `planned`) instead of resuming the old one.
    Raises DamagedError: one is damaged since then.
    """
    found = _read_all(storage, relpath)
    last_damaged = max((place for place, (_, event) in enumerate(found) if isinstance(event, DamagedError)), default=-1)
    if last_damaged >= 0:
        begun = [
            place
            for place, (_, event) in enumerate(found)
            if place > last_damaged and isinstance(event, Planned) and event.event == "planned"
        ]
        found = found[begun[-1] :] if begun else found
    return [Entry(position, _sound(event)) for position, event in found]


def _read_all(storage: Storage, relpath: str, after: Position = _START) -> list[tuple[Position, Event | DamagedError]]:
    def read(position: Position) -> Event | DamagedError:
        try:
            return read_event(storage, relpath, position)
        except DamagedError as error:
            return error

    wanted = [position for position in positions(storage, relpath) if position > after]
    if len(wanted) < 2:
        return [(position, read(position)) for position in wanted]
    with ThreadPoolExecutor(_READERS) as readers:
        return list(zip(wanted, readers.map(read, wanted), strict=True))


def _sound(event: Event | DamagedError) -> Event:
    if isinstance(event, DamagedError):
        raise event
    return event


def _file(relpath: str, position: Position) -> str:
    return f"{relpath}/{position.owner:06d}-{position.sequence:06d}.json"

"""What happens in a run, as kept for good: one small file per event, written by the owner of the run (event_log.py).

State, attempts, durations and `bmojo status` are folded from these (state.py); nothing else says how far a run is.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from base.config import StrictConfig


class Status(StrEnum):
    """How far a run or a stage is. FAILED is the user's error, RESUMABLE the cluster's fault or an interruption."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"  # it could start but for the room, the pause before another attempt, or another run
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    RESUMABLE = "RESUMABLE"
    CANCELLED = "CANCELLED"
    STOPPED = "STOPPED"  # of a run: a gate kept what was left from being run


class Budget(StrEnum):
    """What another attempt is taken from."""

    RETRIES = "retries"
    LOST_RETRIES = "lost_retries"


EndStatus = Literal[Status.SUCCEEDED, Status.FAILED, Status.RESUMABLE, Status.CANCELLED, Status.STOPPED]


class RunInfo(StrictConfig):
    """What a run is."""

    model_config = ConfigDict(allow_inf_nan=True)

    run_id: str
    name: str
    config: dict[str, Any]  # the whole pipeline file as resolved, secrets masked
    config_path: str | None
    base_dir: str | None = None  # the directory that relative paths in the config start from
    created_at: str
    overrides: tuple[str, ...] | None = None  # given beside the file, secrets masked; None: not known
    git_commit: str | None
    hardware: dict[str, str] = Field(default_factory=dict)  # of the machine that scheduled it first (provenance)
    fingerprints: dict[str, str]
    kinds: dict[str, str] = Field(default_factory=dict)


class EventBase(StrictConfig):
    """Fields of every event. Times are ISO 8601 in UTC, to the millisecond, by the owner's clock."""

    model_config = ConfigDict(allow_inf_nan=True)  # metrics may be infinite

    at: str = Field(default_factory=lambda: utc_now())


class StageEvent(EventBase):
    """Something that happened to one stage."""

    stage: str


class Planned(EventBase):
    """An owner begins; `resumed` if there was one before. The first event of each owner."""

    event: Literal["planned", "resumed"] = "planned"
    info: RunInfo
    reused: tuple[str, ...] = ()  # the stages that were finished already
    reasons: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # why the others run: the plan's reason, changes


class Queued(StageEvent):
    """The stage could start but for `reason`."""

    event: Literal["queued"] = "queued"
    reason: str


class Started(StageEvent):
    """A process works on the stage."""

    event: Literal["started"] = "started"
    attempt: int  # from 1, within this owner
    resumed: bool  # an earlier attempt left something to resume from
    artifact: str  # its path in the run's storage
    log: str  # the file with the output of the process and of its workers, in the run's directory
    pid: int
    host: str


class Progress(StageEvent):
    """How far the stage is: a sample, taken now and then."""

    event: Literal["progress"] = "progress"
    done: int
    total: int | None
    values: dict[str, float]


class Noted(StageEvent):
    """Something worth a line happened in the attempt, and it goes on."""

    event: Literal["noted"] = "noted"
    text: str


class AttemptLost(StageEvent):
    """The attempt ended without a result, and another one follows."""

    event: Literal["attempt_lost"] = "attempt_lost"
    attempt: int
    error: str
    budget: Budget
    left: int  # more attempts in that budget
    pause_s: float


class Finished(StageEvent):
    """The stage's record is there."""

    event: Literal["finished"] = "finished"
    artifact: str  # its path in the run's storage
    recorded_at: str | None = None  # when it was made, if this owner only found it


class Gated(StageEvent):
    """The stage's result was judged: nothing may go on from it, for `reason`; None: now it may."""

    event: Literal["gated"] = "gated"
    reason: str | None


class Failed(StageEvent):
    """The stage ended without a result, and no other attempt follows."""

    event: Literal["failed"] = "failed"
    status: Literal[Status.FAILED, Status.RESUMABLE, Status.CANCELLED]
    error: str


class Ended(EventBase):
    """The owner is done with the run."""

    event: Literal["ended", "cancelled"] = "ended"
    status: EndStatus
    error: str | None = None
    exit_code: int | None = None  # of the command that drove it; None: that of the status


class Sealed(EventBase):
    """Written by a successor in its predecessor's name, whose log ends here: it can append nothing more."""

    event: Literal["sealed"] = "sealed"
    by: int  # the successor's lease number


Event = Annotated[
    Planned | Queued | Started | Progress | Noted | AttemptLost | Finished | Gated | Failed | Ended | Sealed,
    Field(discriminator="event"),
]


def utc_now() -> str:
    """Now, as stored: ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")

"""Whether a training hangs, and what is said about it: pure functions of what the workers told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipelines.stages.train.guards.pulse import Sign

_SHOWN_GROUPS = 4
_SHOWN_RANKS = 8
_SILENT_PERIODS = 4.0  # without a sign
_SLACK_S = 3.0  # for a machine that is busy


class Heard(NamedTuple):
    """The last sign of a worker, and how many seconds ago it came."""

    sign: Sign
    ago_s: float

    @property
    def age_s(self) -> float:
        """Seconds since the worker's last beat, as far as is known."""
        return self.sign.age_s + self.ago_s


def is_hanging(heard: Sequence[Heard], after_s: float) -> bool:
    """Whether no worker got any further for so long, or one has told nothing for so long.

    They wait for one another, so if one gets on, all do; but not while all wait for a disk or a store.
    """
    if not heard:
        return False
    return min(each.age_s for each in heard) > after_s or max(each.ago_s for each in heard) > after_s


def is_silent(each: Heard, period_s: float) -> bool:
    """Whether a worker that tells something every `period_s` has stopped doing so: not even its other threads run."""
    return each.ago_s > _SILENT_PERIODS * period_s + _SLACK_S


class HangReport(NamedTuple):
    """What is known of a training that hangs.

    Attributes:
        num_workers: all of them; those that are not in `heard` never told anything.
        silent: why, by the ranks that tell nothing any more.
        stacks: of all threads, by the ranks that told them.
    """

    num_workers: int
    after_s: float
    heard: Sequence[Heard]
    silent: Mapping[int, str]
    stacks: Mapping[int, str]

    def message(self) -> str:
        """For the console: which rank waits where, ranks at one place together."""
        stuck_s, quiet_s = min(each.age_s for each in self.heard), max(each.ago_s for each in self.heard)
        what = f"no worker got any further for {stuck_s:.0f} s"
        if stuck_s <= self.after_s:
            what = f"a worker has told nothing for {quiet_s:.0f} s"
        said = [f"Training hangs: {what} (hang_after_s={self.after_s:g})."]
        said += [
            f"Rank {each.sign.rank} (host {each.sign.host}, process {each.sign.pid}) is silent: "
            f"{self.silent[each.sign.rank]}. It was last heard {each.ago_s:.0f} s ago, at {_doing(each.sign)}."
            for each in self.heard
            if each.sign.rank in self.silent
        ]
        if missing := sorted(set(range(self.num_workers)) - {each.sign.rank for each in self.heard}):
            said.append(f"{_ranks(missing)} never told anything.")
        places: dict[str, list[Sign]] = {}
        for each in self.heard:
            if each.sign.rank not in self.silent:
                places.setdefault(f"{each.sign.line}, at {_doing(each.sign)}", []).append(each.sign)
        for place, signs in list(places.items())[:_SHOWN_GROUPS]:
            first = signs[0]
            who = f"host {first.host}, process {first.pid}" if len(signs) == 1 else f"as on host {first.host}"
            verb = "waits" if len(signs) == 1 else "wait"
            said.append(f"{_ranks([sign.rank for sign in signs])} ({who}) {verb} in {place}.")
        if len(places) > _SHOWN_GROUPS:
            said.append(f"{len(places) - _SHOWN_GROUPS} more places are in the report.")
        return " ".join(said)

    def text(self) -> str:
        """The whole report: the message, each rank, and the stacks."""
        parts = [self.message(), ""]
        for each in sorted(self.heard, key=lambda each: each.sign.rank):
            sign = each.sign
            state = f"SILENT ({self.silent[sign.rank]})" if sign.rank in self.silent else "answers"
            parts.append(
                f"rank {sign.rank}: host {sign.host}, process {sign.pid}, {state}, last heard {each.ago_s:.1f} s ago, "
                f"last beat {each.age_s:.1f} s ago, at {_doing(sign)}, in {sign.line}"
            )
        for rank, stacks in sorted(self.stacks.items()):
            parts += ["", f"---- rank {rank}", stacks]
        return "\n".join(parts) + "\n"


def _doing(sign: Sign) -> str:
    return f"step {sign.step}: {sign.doing}" if sign.step else sign.doing


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    return f"Ranks {shown}" + (f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else "")

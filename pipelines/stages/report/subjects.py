"""Models of a report: what all sections say about each, and which of them are replicates of one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count

from pipelines.stages.evaluate.results import MeasureResult
from pipelines.stages.sections import Section, Training
from pipelines.storage.artifact import ArtifactDir


@dataclass(frozen=True)
class Measured:
    """What a measure found, and the artifact with its files."""

    result: MeasureResult
    artifact: ArtifactDir | None


@dataclass
class Subject:
    """One model."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    training: Training | None = None
    measured: dict[str, Measured] = field(default_factory=dict)  # by the measure's name


@dataclass(frozen=True)
class Group:
    """Models that differ in their seed alone; mostly one."""

    name: str
    members: tuple[Subject, ...]
    short: str = ""  # the name without what the names of all groups begin with, for plots

    @property
    def is_replicated(self) -> bool:
        """Whether there are several."""
        return len(self.members) > 1

    @property
    def label(self) -> str:
        """Its name, with the number of seeds if there are several."""
        return self._with_seeds(self.name)

    @property
    def short_label(self) -> str:
        """The same, for plots."""
        return self._with_seeds(self.short or self.name)

    def _with_seeds(self, name: str) -> str:
        return f"{name} ({len(self.members)} seeds)" if self.is_replicated else name


def gather(sections: Iterable[Section], trained: Sequence[str] = ()) -> list[Subject]:
    """The models with results, or whose names are in `trained`, in the order of the sections.

    A second value of a measure of the same model makes another subject, with the stage or a number behind its name.
    """
    found: dict[str, Subject] = {}
    for section in sections:
        if section.subject:
            _add(found, section)
    return [subject for subject in found.values() if subject.measured or subject.name in trained]


def _add(found: dict[str, Subject], section: Section) -> None:
    own = section.subject
    measures = {result.name for result in section.results}
    candidates = chain(
        [own], [f"{own} ({section.source})"] if section.source else (), (f"{own} ({number})" for number in count(2))
    )
    name = next(name for name in candidates if name not in found or not measures & found[name].measured.keys())
    if name not in found:
        first = found.get(own, Subject(own))
        found[name] = Subject(name, dict(first.facts), first.training)
    subject = found[name]
    subject.facts |= section.facts
    subject.training = section.training or subject.training
    subject.measured |= {result.name: Measured(result, section.artifact) for result in section.results}


def group(subjects: Sequence[Subject]) -> list[Group]:
    """Replicates together, in the order of the first of each. A seed counts once per group."""
    groups: list[list[Subject]] = []
    for subject in subjects:
        fitting = (members for members in groups if _is_replicate(subject, members))
        members = next(fitting, None)
        if members is None:
            groups.append([subject])
        else:
            members.append(subject)
    names = _distinct([_common_name([subject.name for subject in members]) for members in groups])
    return [
        Group(name, tuple(members), short)
        for name, short, members in zip(names, _without_beginning(names), groups, strict=True)
    ]


def _is_replicate(subject: Subject, members: Sequence[Subject]) -> bool:
    training, first = subject.training, members[0].training
    if training is None or first is None or training.seed is None or first.seed is None:
        return False
    seeds = {member.training.seed for member in members if member.training}
    return (
        training.seed not in seeds
        and _canonical(training.recipe) == _canonical(first.recipe)
        and _units(subject) == _units(members[0])
    )


def _units(subject: Subject) -> dict[str, int]:
    return {name: measured.result.num_units for name, measured in subject.measured.items()}


def _canonical(recipe: Mapping[str, object]) -> str:
    return json.dumps(recipe, sort_keys=True, default=str)


def _common_name(names: Sequence[str]) -> str:
    """The parts that all names begin and end with; the first name if there are none."""
    if len(names) == 1:
        return names[0]
    split = [re.split(r"(?<=[-/ _])|(?=[-/ _])", name) for name in names]
    shortest = min(map(len, split))
    ahead = next((n for n in range(shortest) if len({parts[n] for parts in split}) > 1), shortest)
    behind = next((n for n in range(shortest - ahead) if len({parts[-1 - n] for parts in split}) > 1), shortest - ahead)
    first = split[0]
    common = "".join(first[:ahead]).rstrip("-/ _")
    end = "".join(first[len(first) - behind :]).strip("-/ _") if behind else ""
    return "-".join(part for part in (common, end) if part) or names[0]


def _without_beginning(names: Sequence[str]) -> list[str]:
    """The names without the parts that all of them begin with."""
    split = [re.split(r"(?<=[-/])", name) for name in names]
    same = next((n for n in range(min(map(len, split))) if len({parts[n] for parts in split}) > 1), 0)
    return ["".join(parts[same:]) for parts in split]


def _distinct(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    found = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        found.append(name if counts[name] == 1 else f"{name} #{counts[name]}")
    return found

"""Which run a report is of, and what made each result: commit, versions, hardware, durations, places."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.engine.records import StageRecord, read_record
from pipelines.engine.runs import Run
from pipelines.engine.stage import AnyNode
from pipelines.stages.sections import Table
from pipelines.tracking.links import tracking_links


@dataclass(frozen=True)
class Fact:
    """Something about a run. `href`: the page that it names."""

    name: str
    text: str
    href: str = ""


@dataclass(frozen=True)
class RunIdentity:
    """One run."""

    run_id: str
    facts: tuple[Fact, ...] = field(default=())


def run_identity(run: Run) -> RunIdentity:
    """What is known of a run. Raises UserError: it has no readable history."""
    info = run.info()
    facts = [Fact("run", run.run_id), Fact("started", _time(run.started_at() or info.created_at))]
    if info.config_path:
        command = ["bmojo", "run", info.config_path, *(info.overrides or ())]
        facts.append(Fact("command", shlex.join(command)))
    if info.overrides is not None:
        facts.append(Fact("overrides", shlex.join(info.overrides) or "none"))
    facts.append(Fact("commit", commit_in_words(info.git_commit)))
    facts += [Fact(f"scheduled on, {part}", text) for part, text in info.hardware.items()]
    facts.append(Fact("folder", run.url, _href(run.url)))
    facts += [
        Fact(tracker, link, _href(link))
        for tracker, link in tracking_links(run.storage, run.relpath, info.config).items()
    ]
    return RunIdentity(run.run_id, tuple(facts))


def stages_table(nodes: Sequence[tuple[str, AnyNode]]) -> Table:
    """A row per stage, by its name on the page: what made its result, when, how long that took, and where it is."""
    rows = []
    versions: dict[str, None] = {}
    for name, node in nodes:
        record = read_record(node.artifact)
        if record is None:
            continue
        versions[_versions(record)] = None
        rows.append(
            [
                name,
                node.stage.kind,
                _time(record.created_at),
                _duration(record.duration_s),
                commit_in_words(record.git_commit, digits=10),
                ", ".join(dict.fromkeys(text for text in record.hardware.values() if text != "none")) or "-",
                node.artifact.url,
            ]
        )
    columns = ("stage", "kind", "finished", "duration", "commit", "machine", "artifact")
    notes = [f"Versions: {text}." for text in versions]
    return Table(title="Stages", columns=columns, rows=rows, notes=notes)


def commit_in_words(commit: str | None, digits: int = 40) -> str:
    """The commit, and whether files differed from it."""
    if commit is None:
        return "unknown"
    clean = commit.removesuffix("-dirty")
    return f"{clean[:digits]} with local changes" if clean != commit else clean[:digits]


def _versions(record: StageRecord) -> str:
    return ", ".join(f"{package} {version}" for package, version in record.versions.items())


def _time(iso: str) -> str:
    return f"{iso[:10]} {iso[11:16]} UTC" if len(iso) > 16 else iso


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def _href(text: str) -> str:
    return text if text.startswith(("http://", "https://")) else ""

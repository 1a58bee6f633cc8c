"""The report of a session: JSON for programs, Markdown for people."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.faults.perform import Outcome

_DATA = "faults.json"
_ABOUT = (
    "`make test-faults` writes this page and faults.json. Each experiment runs a pipeline with all kinds of stages and",
    "breaks something while one of them runs. Then it runs the same command until that succeeds. It has recovered if",
    "files and points are those of an unbroken run, and no process, lease or temporary file is left.",
)


def read_report(folder: Path, seed: int) -> list[Outcome]:
    """The experiments of this seed that the report in `folder` has; none where there is no report."""
    file = folder / _DATA
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    return [Outcome.from_json(one) for one in found["experiments"]] if found["seed"] == seed else []


def write_report(folder: Path, outcomes: Sequence[Outcome], command: str, seed: int) -> list[Path]:
    """Write faults.json and faults.md. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(command, seed)
    data, page = folder / _DATA, folder / "faults.md"
    data.write_text(json.dumps({**facts, "experiments": [outcome.as_json() for outcome in outcomes]}, indent=1) + "\n")
    page.write_text(_page(facts, outcomes))
    return [data, page]


def _facts(command: str, seed: int) -> dict[str, str | int]:
    return {
        "command": command,
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Linux {platform.release()}",
        "load": f"{os.getloadavg()[2]:.0f} processes wanted a CPU, on average of the last 15 minutes",
        "versions": f"Python {platform.python_version()}, Ray {version('ray')}, MLflow {version('mlflow')}",
    }


def summary(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Rows of the table by fault, with its head."""
    names = ("by itself", "by the same command", "FAILED", "not hit")
    rows: list[tuple[str, ...]] = [("fault", "runs", *names, "median lost, s")]
    for fault in sorted({outcome.fault for outcome in outcomes}):
        of_fault = [outcome for outcome in outcomes if outcome.fault == fault]
        kinds = Counter(outcome.outcome.partition(" (")[0] for outcome in of_fault)
        lost = sorted(outcome.seconds_lost for outcome in of_fault if outcome.exit_codes)
        median = f"{lost[len(lost) // 2]:.0f}" if lost else ""
        rows.append((fault, str(len(of_fault)), *(str(kinds[name] or "") for name in names), median))
    return rows


def _page(facts: dict[str, str | int], outcomes: Sequence[Outcome]) -> str:
    recovered = sum(outcome.is_recovered for outcome in outcomes)
    lines = ["# Randomised faults", "", *_ABOUT, ""]
    lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in facts.items()]
    lines += ["", f"{recovered} of {len(outcomes)} experiments ended with the bits and points of the unbroken run.", ""]
    lines += _table(summary(outcomes))
    lines += ["", "## Every experiment", ""]
    head = ("#", "fault", "where", "stage", "after, s", "outcome", "exit codes", "lost, s", "commit", "notes")
    rows = [
        (
            str(outcome.number),
            outcome.fault,
            outcome.where,
            outcome.stage,
            f"{outcome.moment_s:.1f}",
            outcome.outcome,
            " ".join(map(str, outcome.exit_codes)),
            f"{outcome.seconds_lost:.0f}",
            outcome.commit[:7],
            "; ".join([*outcome.notes, *outcome.problems]),
        )
        for outcome in outcomes
    ]
    return "\n".join([*lines, *_table([head, *rows])]) + "\n"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]

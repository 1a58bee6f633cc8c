"""The page of the claims, from whatever trials are finished."""

from __future__ import annotations

import platform
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.reproduce.claims import CLAIMS, Claim, Column
from benchmarks.reproduce.figures import Trials, draw, estimate
from benchmarks.reproduce.recipes import Scale, Setting
from benchmarks.reproduce.statements import Reading, Verdict, joined, read
from benchmarks.reproduce.trials import Trial, by_name
from pipelines.stages.numbers import shown, with_interval

NOTES = Path(__file__).parent / "notes"
CORE_FLOPS = 91e9  # per second and core, what large products of matrices reach (docs/LOG.md, 25 November 2026)
CORES = 2
_EQUAL = 1.02
_RULE = """\
**How statements are decided.** Each says that a difference is above a number. The difference is taken seed by seed,
since a seed gives all models the same batches. If the whole 95 % interval over seeds (Student's) lies above the
number, the statement *held*. If all of it lies below, it *did not hold*; else it is *undecided*. A claim held if all
of its statements did. With this many statements one in twenty that make no difference is decided by chance."""


def write(recipes: Mapping[str, Sequence[Trial]], setting: Setting, folder: Path) -> Path:
    """Write README.md and the plots. Args: recipes: all trials of each recipe, finished or not.

    Raises: ValueError: models that a claim calls equal are not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections, overview = [], []
    for claim in CLAIMS:
        trials = {name: found for name, found in by_name(recipes[claim.recipe]).items() if name in set(claim.trials())}
        check_equal(claim, trials)
        readings = [read(statement, trials) for statement in claim.statements]
        has_plot = draw(claim, trials, folder / f"{claim.name}.png")
        sections.append(_section(claim, trials, readings, has_plot))
        overview.append((f"({claim.letter})", f"[{claim.title}](#{_anchor(claim)})", *_outcome(trials, readings)))
    parts = [
        "# The papers' claims at small scale",
        _prose(
            f"Written by `{_command(setting)}`, which runs what is missing and can be killed at any time. "
            f"{_where(setting)}"
        ),
        _table(("", "claim", "outcome", "trials finished"), overview),
        _RULE,
        "## Time",
        _time(recipes, setting),
        *sections,
    ]
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def check_equal(claim: Claim, trials: Trials) -> None:
    """Raises ValueError: parameters or states that the claim calls equal differ by more than 2 %."""
    for groups, what in ((claim.equal_params, "num_params"), (claim.equal_state, "state_bytes")):
        for group in groups:
            found = {name: getattr(one[0].counts, what) for name, one in trials.items() if name[-1] in group}
            if found and max(found.values()) > _EQUAL * min(found.values()):
                raise ValueError(f"claim {claim.name}: {what} should be equal to 2 %, found {found}.")


def _command(setting: Setting) -> str:
    if setting.scale is Scale.QUICK:
        return "python -m benchmarks.reproduce --quick"
    gpu = " GPU=1" if setting.scale is Scale.GPU else ""
    corpus = " CORPUS=" + shlex.quote(" ".join(setting.corpus)) if setting.corpus else ""
    return f"make reproduce{gpu}{corpus}"


def _heading(claim: Claim) -> str:
    return f"({claim.letter}) {claim.title}"


def _anchor(claim: Claim) -> str:
    """As GitHub makes it of the heading."""
    return re.sub(r"[^\w\- ]", "", _heading(claim).lower()).replace(" ", "-")


def _where(setting: Setting) -> str:
    corpus = " Text: " + ", ".join(f"`{path}`" for path in setting.corpus) + "." if setting.corpus else ""
    machine = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    scale = {Scale.CPU: "CPU, float32", Scale.GPU: "one GPU, bfloat16", Scale.QUICK: "a trial run of two steps"}
    return f"Scale: {scale[setting.scale]}; {machine}.{corpus}"


def _outcome(trials: Trials, readings: Sequence[Reading]) -> tuple[str, str]:
    every = [trial for found in trials.values() for trial in found]
    finished = sum(trial.finished is not None for trial in every)
    verdict = joined(reading.verdict for reading in readings)
    if finished < len(every):
        verdict_text = "open" if finished else str(Verdict.UNKNOWN)
    else:
        verdict_text = f"**{verdict}**"
    return verdict_text, f"{finished} of {len(every)}"


def _section(claim: Claim, trials: Trials, readings: Sequence[Reading], has_plot: bool) -> str:
    outcome, finished = _outcome(trials, readings)
    note = NOTES / f"{claim.name}.md"
    parts = [
        f"## {_heading(claim)}",
        f"{_prose(claim.sentence, '> ')}\n\n{_prose(f'({claim.source})')}",
        _prose(f"{claim.how} Recipe: [{claim.recipe}.yaml](../../configs/reproduce/{claim.recipe}.yaml)."),
        _prose(f"Outcome: {outcome}; {finished} trials are finished.{_commits(trials)}"),
        _table(("statement", "difference, 95 % interval", "seeds", ""), map(_statement_row, readings)),
        f"![{claim.title}]({claim.name}.png)" if has_plot else "",
        _figures(claim, trials),
        _equality(claim),
        note.read_text(encoding="utf-8").strip() if note.exists() and has_plot else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _statement_row(reading: Reading) -> tuple[str, ...]:
    statement, found = reading.statement, reading.difference
    text = f"{statement.text} (above {statement.above:+.3f})" if statement.above else statement.text
    if found is None:
        return text, "", "0", str(reading.verdict)
    numbers = shown(found.value, found.low, found.high, signed=True)
    interval = f" ({numbers.interval})" if numbers.low else ""
    return text, f"{numbers.value}{interval}", str(reading.num_seeds), str(reading.verdict)


def _figures(claim: Claim, trials: Trials) -> str:
    head = ["", *(column.title for column in claim.columns), "seeds", "parameters", "state, bytes"]
    return _table(head, (_figures_row(row, claim.columns, trials) for row in claim.rows))


def _figures_row(row: str, columns: Sequence[Column], trials: Trials) -> list[str]:
    cells = []
    for column in columns:
        found = estimate(trials.get((*column.first, row), ()), column.figure)
        cells.append("" if found is None else with_interval(*found))
    own = [trials[name] for name in dict.fromkeys((*column.first, row) for column in columns) if name in trials]
    counts = own[0][0].counts if own else None
    seeds = sorted({sum(trial.finished is not None for trial in found) for found in own})
    sizes = ["", ""] if counts is None else [f"{counts.num_params:,}", f"{counts.state_bytes:,}"]
    return [f"`{row}`", *cells, " to ".join(dict.fromkeys(map(str, seeds[:1] + seeds[-1:]))), *sizes]


def _equality(claim: Claim) -> str:
    texts = []
    for groups, what in ((claim.equal_params, "Parameters"), (claim.equal_state, "Bytes of state")):
        if groups:
            within = "in each group" if len(groups) > 1 else "in all rows"
            within = within if sum(map(len, groups)) == len(claim.rows) or len(groups) > 1 else "where compared"
            texts.append(f"{what} are equal to 2 % {within}; this is checked.")
    return _prose(" ".join(texts)) if texts else ""


def _commits(trials: Trials) -> str:
    found = {
        commit
        for same in trials.values()
        for trial in same
        if trial.finished is not None
        for commit in trial.finished.commits
    }
    return f" Commits: {', '.join(sorted(found))}." if found else ""


class Pace(NamedTuple):
    """How fast trainings were."""

    flops_per_s: float
    start_s: float  # of a start and an evaluation


def pace_of(trials: Iterable[Trial]) -> Pace | None:
    """The mean over finished trials; None: there is none."""
    known = [(trial.flops, trial.finished) for trial in trials if trial.finished is not None]
    if not known:
        return None
    train_s = sum(finished.train_time_s for _, finished in known)
    whole_s = sum(finished.duration_s for _, finished in known)
    return Pace(sum(flops for flops, _ in known) / train_s, (whole_s - train_s) / len(known))


def _time(recipes: Mapping[str, Sequence[Trial]], setting: Setting) -> str:
    rows = list(_time_rows(recipes, setting))
    floor = f"Floor: the FLOPs of training at {CORE_FLOPS / 1e9:.0f} GFLOP/s per core on {CORES} cores, which large "
    floor += "products of matrices reach. Core time is what finished trials took on one core, start and evaluation "
    floor += (
        "included. To do is the estimate of what is missing, by the mean FLOP/s of the finished steps and what starts "
    )
    floor += "and evaluations took."
    head = ("recipe", "trials", "tokens each", "FLOPs", "floor, min", "core time, min", "to do, min on 2 cores")
    return f"{_prose(floor)}\n\n{_table(head, rows)}"


def _time_rows(recipes: Mapping[str, Sequence[Trial]], setting: Setting) -> Iterator[tuple[str, ...]]:
    pace = pace_of([trial for trials in recipes.values() for trial in trials])
    rows = []
    for trials in recipes.values():
        durations_s = [trial.finished.duration_s for trial in trials if trial.finished is not None]
        to_do = [trial for trial in trials if trial.finished is None]
        flops = sum(trial.flops for trial in trials)
        to_do_s = sum(trial.flops / pace.flops_per_s + pace.start_s for trial in to_do) if pace is not None else nan
        rows.append([len(durations_s), len(trials), flops, sum(durations_s), to_do_s])
    for recipe, row in zip(
        (*recipes, "all"), [*rows, [sum(column) for column in zip(*rows, strict=True)]], strict=True
    ):
        num_finished, num_trials, flops, taken_s, to_do_s = row
        tokens = f"{recipes[recipe][0].num_tokens / 1e6:.1f} M" if recipe in recipes else ""
        floor = f"{flops / CORE_FLOPS / CORES / 60:.0f}" if setting.scale is not Scale.GPU else ""
        left = f"{to_do_s / 60 / CORES:.0f}" if isfinite(to_do_s) else ""
        yield recipe, f"{num_finished} of {num_trials}", tokens, f"{flops:.1e}", floor, f"{taken_s / 60:.0f}", left


def _prose(text: str, prefix: str = "") -> str:
    return textwrap.fill(
        text, 118, initial_indent=prefix, subsequent_indent=prefix, break_long_words=False, break_on_hyphens=False
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

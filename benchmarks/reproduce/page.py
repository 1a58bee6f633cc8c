"""The page of the claims, from whatever trials are finished."""

from __future__ import annotations

import os
import platform
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

import torch

from base.errors import UserError
from benchmarks.reproduce.claims import CLAIMS, Claim, Column
from benchmarks.reproduce.explanations import NOTES, digest_of, read_note
from benchmarks.reproduce.figures import Trials, draw, estimate
from benchmarks.reproduce.recipes import Scale, Setting
from benchmarks.reproduce.statements import Reading, Verdict, joined, read
from benchmarks.reproduce.trials import Trial, by_name
from pipelines.stages.numbers import shown, with_interval

COMMITTED = Path(__file__).parent
ROOT = COMMITTED.parents[1]
FILE = "README.md"
CORE_FLOPS = 91e9  # per second and core, what large products of matrices reach (docs/LOG.md, 25 November 2026)
CORES = 2
_EQUAL = 1.02
_TITLE = "# The papers' claims at small scale"
_OVERVIEW_ROW = re.compile(r"^\| \(\w\) \| \[.*\]\(#(.+)\) \| .* \| (\d+) of \d+ \|$", re.M)
_RULE = """\
**How statements are decided.** Each says that a difference is above a number. The difference is taken seed by seed,
since a seed gives all models the same batches. If the whole 95 % interval over seeds (Student's) lies above the
number, the statement *held*. If all of it lies below, it *did not hold*; else it is *undecided*. A claim held if all
of its statements did. With this many statements one in twenty that make no difference is decided by chance."""


class _Found(NamedTuple):
    """What the trials say of a claim."""

    claim: Claim
    trials: Trials  # of its table, finished or not
    readings: Sequence[Reading]

    @property
    def num_trials(self) -> int:
        return sum(map(len, self.trials.values()))

    @property
    def num_finished(self) -> int:
        return sum(trial.finished is not None for found in self.trials.values() for trial in found)

    @property
    def outcome(self) -> str:
        if self.num_finished < self.num_trials:
            return "open" if self.num_finished else str(Verdict.UNKNOWN)
        return f"**{joined(reading.verdict for reading in self.readings)}**"

    def tables(self) -> tuple[str, str]:
        """Of the statements, and of the figures."""
        statements = _table(("statement", "difference, 95 % interval", "seeds", ""), map(_statement_row, self.readings))
        return statements, _figures(self.claim, self.trials)

    def is_explained(self, setting: Setting) -> bool:
        """Whether there is a note on such figures: notes are on whole runs of the recipes as they stand."""
        is_plain = setting.scale is Scale.CPU and not setting.corpus
        return is_plain and self.num_finished == self.num_trials and read_note(self.claim.name) is not None


def write(recipes: Mapping[str, Sequence[Trial]], setting: Setting, folder: Path) -> Path:
    """Write README.md and the plots. Args: recipes: all trials of each recipe, finished or not.

    Raises: UserError: the folder has another page, or one of more finished trials. ValueError: models that a claim
        calls equal are not.
    """
    every = _found(recipes)
    page = folder / FILE
    _check_replaces(every, page)
    for found in every:
        check_equal(found.claim, found.trials)
    folder.mkdir(parents=True, exist_ok=True)
    sections, overview = [], []
    for found in every:
        claim = found.claim
        has_plot = draw(claim, found.trials, folder / f"{claim.name}.png")
        sections.append(_section(found, setting, has_plot))
        count = f"{found.num_finished} of {found.num_trials}"
        overview.append((f"({claim.letter})", f"[{claim.title}](#{_anchor(claim)})", found.outcome, count))
    parts = [
        _TITLE,
        _prose(
            f"Written by `{_command(setting, folder)}`, which runs what is missing and can be killed at any time. "
            f"{_where(setting)}"
        ),
        _table(("", "claim", "outcome", "trials finished"), overview),
        _RULE,
        "## Time",
        _time(recipes, setting),
        *sections,
    ]
    page.write_text(_linked("\n\n".join(parts) + "\n", folder), encoding="utf-8")
    return page


def digests(recipes: Mapping[str, Sequence[Trial]], setting: Setting) -> dict[str, str]:
    """Of the tables of every claim whose note this page can have, by its name."""
    return {one.claim.name: digest_of(*one.tables()) for one in _found(recipes) if one.is_explained(setting)}


def _found(recipes: Mapping[str, Sequence[Trial]]) -> list[_Found]:
    every = []
    for claim in CLAIMS:
        names = set(claim.trials())
        trials = {name: found for name, found in by_name(recipes[claim.recipe]).items() if name in names}
        every.append(_Found(claim, trials, [read(statement, trials) for statement in claim.statements]))
    return every


def _check_replaces(every: Iterable[_Found], page: Path) -> None:
    """Raises UserError: what is there must not be replaced."""
    if not page.exists():
        return
    text = page.read_text(encoding="utf-8")
    if not text.startswith(_TITLE):
        raise UserError(f"{page} is no page of this command. Name another folder with --page.")
    before = {anchor: int(finished) for anchor, finished in _OVERVIEW_ROW.findall(text)}
    for found in every:
        earlier = before.get(_anchor(found.claim), 0)
        if earlier > found.num_finished:
            raise UserError(
                f"{page} has {earlier} finished trials of claim {found.claim.name}; the storage has "
                f"{found.num_finished} with these settings and this version of the code. Name the storage of those "
                "with --storage, or another folder with --page, or delete that page."
            )


def _linked(text: str, folder: Path) -> str:
    """Links to files of this repository, which are written as from the committed page, as from the folder."""
    return text.replace("](../../", f"]({Path(os.path.relpath(ROOT, folder.resolve())).as_posix()}/")


def check_equal(claim: Claim, trials: Trials) -> None:
    """Raises ValueError: parameters or states that the claim calls equal differ by more than 2 %."""
    for groups, what in ((claim.equal_params, "num_params"), (claim.equal_state, "state_bytes")):
        for group in groups:
            found = {name: getattr(one[0].counts, what) for name, one in trials.items() if name[-1] in group}
            if found and max(found.values()) > _EQUAL * min(found.values()):
                raise ValueError(f"claim {claim.name}: {what} should be equal to 2 %, found {found}.")


def _command(setting: Setting, folder: Path) -> str:
    if setting.scale is Scale.QUICK or folder.resolve() == COMMITTED:
        scale = "" if setting.scale is Scale.CPU else f" --{setting.scale}"
        corpus = f" --corpus {shlex.join(setting.corpus)}" if setting.corpus else ""
        page = f" --page {COMMITTED.relative_to(ROOT)}" if folder.resolve() == COMMITTED else ""
        return f"python -m benchmarks.reproduce{scale}{corpus}{page}"
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


def _section(found: _Found, setting: Setting, has_plot: bool) -> str:
    claim, trials = found.claim, found.trials
    statements, figures = found.tables()
    finished = f"{found.num_finished} of {found.num_trials} trials are finished."
    parts = [
        f"## {_heading(claim)}",
        f"{_prose(claim.sentence, '> ')}\n\n{_prose(f'({claim.source})')}",
        _prose(f"{claim.how} Recipe: [{claim.recipe}.yaml](../../configs/reproduce/{claim.recipe}.yaml)."),
        _prose(f"Outcome: {found.outcome}; {finished}{_commits(trials)}"),
        statements,
        f"![{claim.title}]({claim.name}.png)" if has_plot else "",
        figures,
        _equality(claim),
        _explanation(claim, digest_of(statements, figures)) if found.is_explained(setting) else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _explanation(claim: Claim, digest: str) -> str:
    note = read_note(claim.name)
    if note is not None and note.digest == digest:
        return note.text
    link = f"[notes/{claim.name}.md](../../{NOTES.relative_to(ROOT)}/{claim.name}.md)"
    return _prose(f"*The explanation in {link} is left out: it was written for other figures than these.*")


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

"""Break whole pipelines at random, and see that the same command always ends with the same bits.

Every experiment runs the real command on a pipeline with all kinds of stages, breaks something while a stage runs, and
runs the same command again until it succeeds. Then files, points, processes and leases are compared with those of a run
that nobody broke.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.faults.experiments import Experiment, draw
from tests.faults.kinds import FAULTS
from tests.faults.kinds.disks import FAULTS as DISK_FAULTS
from tests.faults.kinds.disks import can_mount
from tests.faults.perform import Outcome, perform
from tests.faults.places import Local, Place, ThreeRaylets
from tests.faults.processes import end_all
from tests.faults.reference import make_reference
from tests.faults.report import read_report, summary, write_report

_OWN_MOUNTS = "BMOJO_FAULTS_OWN_MOUNTS"


def main() -> int:
    """Return 0 if every experiment recovered."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    _take_own_mounts()
    console = Console()
    chosen = _chosen(arguments, console)
    if arguments.list:
        for one in chosen:
            console.print(f"{one.number:3d}  {one.fault:16} {one.where:8} {one.stage:10} at {one.moment:.0%} of it")
        return 0
    work = Path(arguments.work)
    console.print("The unbroken run ...")
    reference = make_reference(work)
    outcomes = read_report(Path(arguments.report), arguments.seed) if arguments.report else []
    if not arguments.number:
        done = {outcome.number for outcome in outcomes if outcome.is_recovered}
        chosen = [one for one in chosen if one.number not in done]
    places: dict[str, Place] = {}
    deadline = time.monotonic() + 60 * arguments.minutes
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("faults", total=len(chosen))
            for experiment in chosen:
                if time.monotonic() > deadline:
                    console.print(f"{arguments.minutes:g} minutes are over.")
                    break
                progress.update(bar, description=f"{experiment.fault} in {experiment.stage}")
                if experiment.where not in places:
                    places[experiment.where] = _open(experiment.where, work)
                outcome = perform(experiment, places[experiment.where], reference, work)
                outcomes = sorted(
                    [outcome, *(one for one in outcomes if one.number != outcome.number)], key=lambda one: one.number
                )
                _show(console, experiment, outcome, work)
                progress.advance(bar)
                if arguments.report:
                    write_report(Path(arguments.report), outcomes, _command(arguments), arguments.seed)
    finally:
        for place in places.values():
            place.close()
    _show_summary(console, outcomes)
    return 0 if all(outcome.is_recovered for outcome in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    parser.add_argument("--count", type=int, default=100, help="experiments (default: %(default)s)")
    parser.add_argument("--number", type=int, action="append", help="only this experiment of the seed; may be repeated")
    parser.add_argument("--only", action="append", metavar="KIND", help=f"of: {', '.join(FAULTS)}; may be repeated")
    parser.add_argument("--where", choices=("local", "cluster"), help="only there (default: both)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no experiment after so many minutes")
    parser.add_argument(
        "--report", metavar="DIR", help="write faults.json and faults.md there; what it has recovered is not done again"
    )
    parser.add_argument(
        "--work", default="/tmp/bmojo-faults", help="folder of the runs (default: %(default)s); keep it short"
    )
    parser.add_argument("--list", action="store_true", help="only say what would be done")
    return parser.parse_args()


def _take_own_mounts() -> None:
    """Start this again with mounts of its own, where that is allowed: nothing that is mounted outlives it, and
    /dev/shm shows what is its own."""
    if os.environ.get(_OWN_MOUNTS) is None:
        unshare = ["unshare", "--mount", "--propagation", "private"]
        if subprocess.run([*unshare, "true"], capture_output=True).returncode == 0:
            os.environ[_OWN_MOUNTS] = "1"
            os.execvp("unshare", [*unshare, sys.executable, "-m", "tests.faults", *sys.argv[1:]])
    else:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)


def _chosen(arguments: argparse.Namespace, console: Console) -> list[Experiment]:
    """Number n has the same fault whatever else is asked for: kinds and places take turns in a drawn order."""
    pairs = [(fault, where) for fault in FAULTS.values() for where in fault.places]
    rng = random.Random(arguments.seed)
    order: list[tuple[str, str]] = []
    while len(order) < arguments.count or (arguments.only and len(order) < 50 * arguments.count):
        turn = [(fault.name, where) for fault, where in pairs]
        rng.shuffle(turn)
        order += turn
    drawn = [
        draw(arguments.seed, number, name, where, FAULTS[name].stages)  # type: ignore[arg-type]
        for number, (name, where) in enumerate(order)
    ]
    if arguments.number:
        return [one for one in drawn if one.number in arguments.number]
    if not can_mount():
        console.print("No file system may be mounted here: faults of disks are left out.")
        disks = {fault.name for fault in DISK_FAULTS}
        drawn = [one for one in drawn if one.fault not in disks]
    drawn = [one for one in drawn if one.where == (arguments.where or one.where)]
    drawn = [one for one in drawn if not arguments.only or one.fault in arguments.only]
    return drawn[: arguments.count]


def _open(where: str, work: Path) -> Place:
    if where == "local":
        return Local()
    end_all("cluster")
    folder = work / "cluster"
    shutil.rmtree(folder, ignore_errors=True)
    return ThreeRaylets(folder)


def _command(arguments: argparse.Namespace) -> str:
    """What gives such a report, in one go or in several."""
    return shlex.join(["python", "-m", "tests.faults", "--seed", str(arguments.seed), "--report", arguments.report])


def _show(console: Console, experiment: Experiment, outcome: Outcome, work: Path) -> None:
    style = "green" if outcome.is_recovered else "red"
    console.print(
        f"{outcome.number:3d}  {outcome.fault:16} {outcome.where:8} {outcome.stage:10} [{style}]{outcome.outcome}[/]  "
        f"{outcome.seconds:.0f} s, lost {outcome.seconds_lost:.0f} s  {outcome.exit_codes}  {'; '.join(outcome.notes)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not outcome.is_recovered:
        for problem in outcome.problems:
            console.print(f"     {problem}", markup=False, highlight=False, soft_wrap=True)
        again = f"python -m tests.faults --seed {experiment.seed} --number {experiment.number}"
        console.print(
            f"     kept: {work / experiment.name}; again: {again}", markup=False, highlight=False, soft_wrap=True
        )


def _show_summary(console: Console, outcomes: list[Outcome]) -> None:
    head, *rows = summary(outcomes)
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

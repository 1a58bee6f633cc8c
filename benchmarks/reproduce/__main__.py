"""`make reproduce`: run the recipes one after another, one seed of all first, and write the page after each.

Finished trials are reused and interrupted ones resumed, as by `bmojo run`, so the same command goes on after a kill.
The page is in the folder `reproduce` of the storage. The one in the repository is written on request alone:

    python -m benchmarks.reproduce --page-only --page benchmarks/reproduce
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from base.errors import UserError
from benchmarks.reproduce import explanations, page
from benchmarks.reproduce.claims import CLAIMS
from benchmarks.reproduce.recipes import QUICK_SEEDS, RECIPES, Scale, Setting, num_seeds, recipe_file
from benchmarks.reproduce.trials import Trial, trials_of
from pipelines.storage import LocalStorage, open_storage


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the first recipe that failed (the page has what the others gave); 1: wrong input."""
    options = _parser().parse_args(arguments)
    try:
        return _reproduce(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _reproduce(options: argparse.Namespace) -> int:
    scale = Scale.QUICK if options.quick else Scale.GPU if options.gpu else Scale.CPU
    storage = options.storage or ("runs" if scale is Scale.CPU else f"runs/reproduce-{scale}")
    setting = Setting(scale, storage, tuple(options.corpus), options.cpus)
    folder = options.page or _folder(setting)
    runs_nothing = options.page_only or options.confirm_notes
    if runs_nothing and not open_storage(storage).list("artifacts"):
        raise UserError(f"--storage {storage}: nothing is finished there. Name the storage of the trials.")
    trials = _trials(setting)  # before anything runs, so that what is wrong with one of the recipes stops here
    _confirm(options.confirm_notes, page.digests(trials, setting), storage)
    print(f"Page: {page.write(trials, setting, folder)}", flush=True)
    codes = [0]
    for recipe, seeds in () if runs_nothing else rounds(options.only, most_of(scale, options.seeds)):
        codes.append(_run(recipe, seeds, setting))
        if codes[-1] == 130:  # Ctrl-C means all of it
            return 130
        trials = _trials(setting)
        page.write(trials, setting, folder)
    for name, digest in page.digests(trials, setting).items():
        if not explanations.is_about(name, digest):
            print(f"The note on {name} is about other figures, so the page is without it. When it is rewritten: "
                  f"--confirm-notes {name}")  # fmt: skip
    if not runs_nothing:
        print(f"Page: {folder / page.FILE}")
    return next((code for code in codes if code), 0)


def _folder(setting: Setting) -> Path:
    """Beside the trials. Those of another text have a page of their own, as the rest of them may be the same.

    Raises: UserError: the storage is no folder.
    """
    storage = open_storage(setting.storage)
    if not isinstance(storage, LocalStorage):
        raise UserError(f"--storage {setting.storage}: the page needs a local folder. Name one with --page.")
    return storage.path("reproduce-corpus" if setting.corpus else "reproduce")


def _confirm(names: Sequence[str], digests: Mapping[str, str], storage: str) -> None:
    if unfinished := [name for name in names if name not in digests]:
        raise UserError(
            f"--confirm-notes {' '.join(unfinished)}: a note is on all trials of a claim as the recipes stand, of the "
            f"standard library's text. They are not all finished in {storage}."
        )
    for name in names:
        print(f"Confirmed: {explanations.confirm(name, digests[name])}")


def most_of(scale: Scale, seeds: int | None) -> int:
    """Seeds of each training, at most."""
    return min(QUICK_SEEDS if scale is Scale.QUICK else sys.maxsize, sys.maxsize if seeds is None else seeds)


def rounds(recipes: Sequence[str], most: int) -> Iterator[tuple[str, int]]:
    """Recipes with the number of their seeds to run: one of all recipes, then two, and so on."""
    wanted = {recipe: min(num_seeds(recipe), most) for recipe in recipes}
    for seeds in range(1, max(wanted.values()) + 1):
        yield from ((recipe, seeds) for recipe, number in wanted.items() if number >= seeds)


def _run(recipe: str, seeds: int, setting: Setting) -> int:
    print(f"== {recipe}, {seeds} of {num_seeds(recipe)} seeds", flush=True)
    overrides = setting.overrides(recipe, seeds)
    command = [sys.executable, "-m", "pipelines", "run", str(recipe_file(recipe)), *overrides]
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal interrupted it, too
        return process.wait() or 130


def _trials(setting: Setting) -> dict[str, list[Trial]]:
    return {recipe: trials_of(recipe, setting) for recipe in RECIPES}


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="longer trainings on one GPU instead of on 2 CPU cores")
    parser.add_argument("--quick", action="store_true", help="two values of everything, two steps: does it run?")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, help="recipes to run; default: all")
    parser.add_argument("--seeds", type=_at_least_one, help="seeds of each training to run, at most; default: all")
    parser.add_argument("--corpus", nargs="+", default=[], help="text files instead of the standard library's sources")
    parser.add_argument("--storage", help="where runs are kept; default: runs, or runs/reproduce-SCALE")
    parser.add_argument("--cpus", type=_at_least_one, help="trainings at the same time; default: one per core")
    parser.add_argument("--page", type=Path, help="folder of the page; default: reproduce in the storage")
    parser.add_argument(
        "--confirm-notes", nargs="+", choices=[claim.name for claim in CLAIMS], default=[], metavar="CLAIM",
        help="run nothing: notes/CLAIM.md was read again and is about the figures as they are now; write the page",
    )  # fmt: skip
    parser.add_argument("--page-only", action="store_true", help="run nothing, write the page of what is finished")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`make reproduce`: run the recipes one after another, one seed of all first, and write the page after each.

Finished trials are reused and interrupted ones resumed, as by `bmojo run`, so the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.reproduce import page
from benchmarks.reproduce.recipes import QUICK_SEEDS, RECIPES, Scale, Setting, num_seeds, recipe_file
from benchmarks.reproduce.trials import trials_of

COMMITTED = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the first recipe that failed; the page has what the others gave."""
    options = _parser().parse_args(arguments)
    scale = Scale.QUICK if options.quick else Scale.GPU if options.gpu else Scale.CPU
    storage = options.storage or ("runs" if scale is Scale.CPU else f"runs/reproduce-{scale}")
    setting = Setting(scale, storage, tuple(options.corpus), options.cpus)
    is_committed = scale is Scale.CPU and not setting.corpus
    folder = options.page or (COMMITTED if is_committed else Path(storage) / "reproduce")
    codes = [0]
    for recipe, seeds in () if options.page_only else rounds(options.only, most_of(scale, options.seeds)):
        codes.append(_run(recipe, seeds, setting))
        if codes[-1] == 130:  # Ctrl-C means all of it
            return 130
        _write(setting, folder)
    print(f"Page: {_write(setting, folder)}")
    return next((code for code in codes if code), 0)


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


def _write(setting: Setting, folder: Path) -> Path:
    return page.write({recipe: trials_of(recipe, setting) for recipe in RECIPES}, setting, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="longer trainings on one GPU instead of on 2 CPU cores")
    parser.add_argument("--quick", action="store_true", help="two values of everything, two steps: does it run?")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, help="recipes to run; default: all")
    parser.add_argument("--seeds", type=int, help="seeds of each training to run, at most; default: all")
    parser.add_argument("--corpus", nargs="+", default=[], help="text files instead of the standard library's sources")
    parser.add_argument("--storage", help="where runs are kept; default: runs, or runs/reproduce-SCALE")
    parser.add_argument("--cpus", type=int, help="trainings at the same time; default: as many as there are cores")
    parser.add_argument("--page", type=Path, help="folder of the page; default: this package, for the plain command")
    parser.add_argument("--page-only", action="store_true", help="run nothing, write the page of what is finished")
    return parser


if __name__ == "__main__":
    sys.exit(main())

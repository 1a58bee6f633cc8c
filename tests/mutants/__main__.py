"""`make mutants`: apply each mutant to a copy of the checkout and see whether its tests reject it."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.mutants import MUTANTS, ROOT, Mutant

_FAILED_TESTS = 1  # pytest's exit code if tests ran and some failed; others mean that nothing was judged
_LIMIT_S = 900


def main() -> int:
    """Report every mutant. Returns 0 if all are killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="run the mutants whose name contains this text")
    parser.add_argument("--list", action="store_true", help="only list them")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    if arguments.list or not mutants:
        print("\n".join(mutant.name for mutant in mutants) or f"no mutant's name contains {arguments.only!r}")
        return 0 if mutants else 2
    with tempfile.TemporaryDirectory(prefix="bmojo-mutants-") as folder:
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        print(f"{len(mutants)} mutants. First the unchanged code, which must pass: {' '.join(tests)}", flush=True)
        code, output, elapsed_s = _judge(_copy(Path(folder) / "unchanged"), tests)
        if code:
            print(f"{output}\nerror: the tests do not pass without a mutant (exit code {code}).")
            return 2
        print(f"passed in {elapsed_s:.0f} s\n", flush=True)
        killed = sum(_report(mutant, Path(folder)) for mutant in mutants)
    print(f"\n{killed} of {len(mutants)} killed")
    return 0 if killed == len(mutants) else 1


def _report(mutant: Mutant, folder: Path) -> bool:
    copy = _copy(folder / "mutant")
    for edit in mutant.edits:
        edit.apply(copy)
    code, output, elapsed_s = _judge(copy, mutant.tests)
    killer = next((line.split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")), "")
    verdict = {_FAILED_TESTS: "killed  ", 0: "SURVIVED"}.get(code, f"UNJUDGED (pytest exit code {code})")
    print(f"{verdict}  {mutant.name}  {elapsed_s:.0f} s  {killer.removeprefix('FAILED ')}", flush=True)
    if code not in (0, _FAILED_TESTS):
        print("\n".join(output.splitlines()[-15:]))
    return code == _FAILED_TESTS


def _judge(root: Path, tests: Sequence[str]) -> tuple[int, str, float]:
    """Run the tests on the copy, whose modules come before the installed ones."""
    started = time.monotonic()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", f"--timeout={_LIMIT_S}"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=root, capture_output=True, text=True, check=False
    )
    return found.returncode, found.stdout + found.stderr, time.monotonic() - started


def _copy(target: Path) -> Path:
    """The tracked files as they are now; what an earlier mutant left is gone."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


if __name__ == "__main__":
    sys.exit(main())

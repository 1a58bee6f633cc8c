"""Real drivers and commands in processes of their own, for the tests of what can be asked of runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.engine.runs import Run, list_runs
from pipelines.storage import open_storage
from tests.pipelines import forked
from tests.pipelines.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
KIND = "tests.pipelines.api.steps_kind"
COMMAND = (sys.executable, "-m", KIND)
PIPELINE = """\
name: {name}
storage: {storage}
tracking: {{uri: "http://127.0.0.1:9/"}}
stages:
  first: {{kind: steps}}
  second: {{kind: steps, needs: [first]}}
"""


class Said(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class World:
    """A storage and a pipeline file, `steps.yaml` by default."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage = folder, folder / "runs"
        self._drivers: list[subprocess.Popen[str]] = []
        self.write()

    def write(self, name: str = "steps", text: str = PIPELINE) -> Path:
        file = self.folder / f"{name}.yaml"
        file.write_text(text.format(name=name, storage=self.storage))
        return file

    def bmojo(self, *arguments: str | Path, answer: str = "", **environment: str) -> Said:
        """A command to its end. `--storage` is this one, unless it is a command that has none."""
        at = () if arguments[0] in ("run", "plan") else ("--storage", str(self.storage))
        given = [*map(str, arguments), *at]
        return Said(*forked.bmojo(given, self._environ(environment), self.folder, answer, kinds=KIND))

    def run(self, *overrides: str, name: str = "steps") -> Said:
        return self.bmojo("run", self.folder / f"{name}.yaml", *overrides)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """A command that goes on; its output, with errors in it, is in its stdout."""
        at = () if arguments[0] == "run" else ("--storage", str(self.storage))
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), *at],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self._environ({}), cwd=self.folder,
        )  # fmt: skip
        self._drivers.append(process)
        return process

    def drive(self, *overrides: str) -> subprocess.Popen[str]:
        """A driver of the run, once its first stage has done a step."""
        process = self.start("run", self.folder / "steps.yaml", *overrides)
        wait_until(lambda: process.poll() is not None or list(self.storage.glob("artifacts/steps/first-*/steps/*")), 60)
        assert process.poll() is None, process.communicate()[0]
        return process

    @property
    def latest(self) -> Run:
        return list_runs(open_storage(self.storage))[-1]

    def close(self) -> None:
        for process in self._drivers:
            process.kill()
            process.communicate()

    def _environ(self, more: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        # The commands run in the test's folder, from which `tests` and its kinds of stage are to be importable.
        ours = {"COLUMNS": "250", "PYTHONPATH": str(ROOT), "BMOJO_CACHE_DIR": str(self.folder / "cache")}
        return kept | ours | more

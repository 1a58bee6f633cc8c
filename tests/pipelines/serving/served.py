"""`bmojo` as a process of its own, with the tiny model in place of a run's: served.py FOLDER ARGUMENT..."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PATTERN = "bmojo,mamba2,bmojo_f"


@dataclass
class Served:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What a client sends."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=300)


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.pipelines.serving.served", str(folder), *arguments]


def environment(**others: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "BMOJO_API_KEY"}
    return {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **others}


def start(folder: Path, *options: str, **others: str) -> Served:
    """A server on a free port, once it listens."""
    process = subprocess.Popen(
        command(folder, "serve", "--port", "0", "--states", str(folder / "states"), *options),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**others), cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"Serving .* on (http://\S+)", line):
            return Served(process, found[1])
    raise AssertionError(f"the server ended with {process.wait()}")


def main() -> None:
    from pipelines.cli import app, chat, serve
    from tests.pipelines.stages.trained_run import trained_model

    trained = trained_model(Path(sys.argv[1]), PATTERN)
    for module in (chat, serve):
        vars(module)["load_for_decoding"] = lambda *_: trained
    sys.argv[1:2] = []
    app.main()


if __name__ == "__main__":
    main()

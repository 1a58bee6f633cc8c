"""Shows an inspection with its run in the sinks. That may fail, and may not take long."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.engine.runs import Run
from pipelines.tracking.config import stored_targets

TIMEOUT_S = 30.0


def publish_inspection(run: Run, files: Sequence[Path], name: str, timeout_s: float = TIMEOUT_S) -> str | None:
    """Log files in a folder `name` of the pipeline run's artifacts. Returns what went wrong, None if nothing did."""
    problem: list[str] = [f"no answer within {timeout_s:g} s"]

    def publish() -> None:
        try:
            _publish(run, files, name)
        except Exception as error:  # whatever a sink or the network raises: the files are written already
            problem[:] = [str(error).partition("\n")[0] or type(error).__name__]
        else:
            problem.clear()

    thread = threading.Thread(target=publish, name="publish inspection", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return problem[0] if problem else None


def _publish(run: Run, files: Sequence[Path], name: str) -> None:
    for target in stored_targets(run.info().config, run.storage):
        sink = target.open(run.run_id)
        shown = sink.open_run(None, int(time.time() * 1000))
        with tempfile.TemporaryDirectory(prefix="bmojo-") as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            for file in files:
                shutil.copy(file, folder)
            sink.send(shown, [{"event": "artifact", "path": name}], artifact_url=scratch)

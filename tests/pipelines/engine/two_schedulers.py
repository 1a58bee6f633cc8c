"""Two schedulers start on one run at once, in a fresh storage each time, and say what each came to.

    python -m tests.pipelines.engine.two_schedulers STORAGE TIMES

Prints a line of JSON per time. The two are forked, so that they begin within a millisecond of one another.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from pipelines.engine.lease import LeaseHeldError
from pipelines.storage import open_storage
from pipelines.tracking.replay import Replay
from tests.pipelines.engine.counting_pipeline import InThreads, run_here


def main() -> None:
    url, times = sys.argv[1], int(sys.argv[2])
    Replay.deliver = lambda self: False  # type: ignore[method-assign]  # MLflow has tests of its own
    if url.startswith("s3:"):
        import s3fs  # noqa: F401  # once, not in every child
    for number in range(times):
        print(json.dumps([outcome for outcome in both(f"{url}/{number}")]), flush=True)


def both(url: str) -> list[str]:
    gate, opener = os.pipe()
    answers = [start(url, gate, opener) for _ in range(2)]
    os.close(gate)
    os.close(opener)  # both read its end, and begin
    outcomes = []
    for child, answer in answers:
        with os.fdopen(answer) as pipe:
            outcomes.append(pipe.read())
        os.waitpid(child, 0)
    return outcomes


def start(url: str, gate: int, opener: int) -> tuple[int, int]:
    answer, said = os.pipe()
    child = os.fork()
    if child:
        os.close(said)
        return child, answer
    os.close(opener)
    os.read(gate, 1)
    try:
        outcome = str(run_here(open_storage(url), step_s=0.05, upto=3, launcher=InThreads()).status)
    except LeaseHeldError:
        outcome = "refused"
    except BaseException:
        outcome = traceback.format_exc()
    os.write(said, outcome.encode())
    os._exit(0)


if __name__ == "__main__":
    main()

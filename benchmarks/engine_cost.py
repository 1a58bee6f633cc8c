"""What the engine itself costs per stage: `python -m benchmarks.engine_cost`.

Stages that do nothing, in a row and all at once, each in a process of its own, in a local folder; then the same command
again, which has nothing to do. No Ray, no tracker.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from benchmarks._noop_stages import NoCluster, noop_pipeline
from pipelines.engine.scheduler import run_pipeline
from pipelines.storage import open_storage
from pipelines.tracking.run_tracking import TrackingOptions


def measure(num_stages: int, in_a_row: bool) -> tuple[float, float]:
    """Seconds of the first run and of the second."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):
            pipeline = noop_pipeline(open_storage(folder), num_stages, in_a_row)
            started = time.perf_counter()
            result = run_pipeline(pipeline, TrackingOptions((), system_metrics=False, drain_s=0), NoCluster())
            seconds.append(time.perf_counter() - started)
            assert result.status == "SUCCEEDED", result.failure
    return seconds[0], seconds[1]


def main() -> None:
    """Print a row per form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for in_a_row in (True, False):
        one = [measure(1, in_a_row) for _ in range(arguments.repeats)]
        seven = [measure(7, in_a_row) for _ in range(arguments.repeats)]
        start_s = statistics.median(first for first, _ in one)
        more_s = statistics.median(first for first, _ in seven) - start_s
        nothing_s = statistics.median(second for _, second in seven)
        print(
            f"{'in a row' if in_a_row else 'at once':9} 1 stage {start_s:.2f} s, each more {more_s / 6:.2f} s; "
            f"7 stages with nothing to do {nothing_s:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

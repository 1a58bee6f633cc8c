"""What a submitted job runs: `python -P -m pipelines.job_main` is `bmojo` with the variables of the job."""

from __future__ import annotations

from pipelines.__main__ import main
from pipelines.submit.environment import load

if __name__ == "__main__":
    load()
    main()

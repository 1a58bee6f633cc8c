"""What can be asked of runs, in Python: the `bmojo` commands print what these return, and decide nothing.

    from pipelines import api
    storage = api.open_storage("runs")
    for now in api.watch(api.find_run(storage, "quickstart")):
        print(now.status, now.stage("train").values)

Results are pydantic models: `.model_dump_json()` gives what the commands print with --json.
"""

from __future__ import annotations

from pipelines.api.checkpoints import CheckpointRow, checkpoints
from pipelines.api.comparison import compare
from pipelines.api.difference import RunDifference, diff
from pipelines.api.finding import find_run_anywhere, find_stage, known_stage
from pipelines.api.finished import finished_stages
from pipelines.api.garbage import Garbage, GarbageReport, Limits, delete_garbage, find_garbage
from pipelines.api.listing import RunRow, list_runs
from pipelines.api.log_lines import LogLine, logs
from pipelines.api.reasons import RunReasons, StageReasons, why
from pipelines.api.results import (
    RunMetadata,
    StageMetadata,
    StageOutputFacts,
    run_metadata,
    stage_metadata,
    stage_output,
)
from pipelines.api.resuming import ResumedRun, resume, resume_all
from pipelines.api.run_status import RunStatus, StageStatus, status, watch
from pipelines.engine.runs import delete_run, find_run, unlock_run
from pipelines.loading import load_pipeline
from pipelines.session import run_config
from pipelines.storage import open_storage
from pipelines.submit.job import Job
from pipelines.submit.submission import submit

__all__ = [
    "CheckpointRow",
    "Garbage",
    "GarbageReport",
    "Job",
    "Limits",
    "LogLine",
    "ResumedRun",
    "RunDifference",
    "RunMetadata",
    "RunReasons",
    "RunRow",
    "RunStatus",
    "StageMetadata",
    "StageOutputFacts",
    "StageReasons",
    "StageStatus",
    "checkpoints",
    "compare",
    "delete_garbage",
    "delete_run",
    "diff",
    "find_garbage",
    "find_run",
    "find_run_anywhere",
    "find_stage",
    "finished_stages",
    "known_stage",
    "list_runs",
    "load_pipeline",
    "logs",
    "open_storage",
    "resume",
    "resume_all",
    "run_config",
    "run_metadata",
    "stage_metadata",
    "stage_output",
    "status",
    "submit",
    "unlock_run",
    "watch",
    "why",
]

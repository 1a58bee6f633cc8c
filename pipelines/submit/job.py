"""A submitted job: making it, hearing which run it works on, following its output."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.engine.failures import EXIT_RESUMABLE
from pipelines.engine.provenance import git_commit
from pipelines.errors import InfrastructureError
from pipelines.redact import redact
from pipelines.submit import environment
from pipelines.submit.dashboard import explained_jobs
from pipelines.submit.package import JOB_FOLDER, Contents, write_package

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RESTARTS = 10  # of a scheduler, without progress
START_S = 120.0  # for the job to say which run it is
STOP_S = 40  # for `ray job stop`: a scheduler takes up to 20 s, and then its attempts end
_POLL_S = 0.5
_PATIENCE_S = 60.0  # with a dashboard that does not answer while it is followed


@dataclass(frozen=True)
class Request:
    """What to run."""

    name: str  # of the pipeline
    config: Path  # absolute
    overrides: Sequence[str]
    restarts: int
    contents: Contents
    base: Path  # above all files and the current directory
    variables: dict[str, str]


@dataclass(frozen=True)
class StartedRun:
    """The run that a job works on, as it says itself."""

    run_id: str
    storage: str


class Job:
    """A job that was submitted."""

    def __init__(self, client: JobSubmissionClient, url: str, job_id: str, pipeline: str) -> None:
        self._client, self.url, self.job_id, self.pipeline = client, url, job_id, pipeline

    @classmethod
    def submit(cls, client: JobSubmissionClient, url: str, request: Request) -> Job:
        """Upload the package, and start the job. Raises UserError: it is too large. InfrastructureError."""
        runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
        runtime_env["env_vars"]["BMOJO_DASHBOARD"] = str(redact(url))
        if commit := git_commit():
            runtime_env["env_vars"]["BMOJO_GIT_COMMIT"] = commit
        variables = None
        if request.variables:
            variables = environment.to_file(request.variables)
            runtime_env["worker_process_setup_hook"] = environment.HOOK
        with tempfile.TemporaryDirectory(prefix="bmojo-submit-") as folder:
            package = Path(folder) / "package.zip"
            write_package(package, request.contents, request.base, variables)
            with explained_jobs(url):
                job_id = client.submit_job(
                    entrypoint=_entrypoint(request),
                    submission_id=f"{request.name}-{secrets.token_hex(4)}",
                    runtime_env={**runtime_env, "working_dir": str(package)},
                    metadata={"bmojo.pipeline": request.name},
                )
        return cls(client, url, job_id, request.name)

    def wait_for_run(self, timeout_s: float = START_S) -> StartedRun | None:
        """Wait until the job says which run it is; None if it ended before, or did not say so in time."""
        line = re.compile(rf"^({re.escape(self.pipeline)}-[0-9a-f]{{8}}) in (\S.*)$", re.MULTILINE)
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.exit_code() is not None
            match = line.search(self.output())
            if match:
                return StartedRun(match[1], match[2])
            if ended or time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)

    def exit_code(self) -> int | None:
        """Exit code of the scheduler, 75 if Ray ended the job; None while it works."""
        with explained_jobs(self.url):
            info = self._client.get_job_info(self.job_id)
        if not info.status.is_terminal():
            return None
        code = info.driver_exit_code
        return EXIT_RESUMABLE if code is None or code < 0 else code

    def message(self) -> str:
        """What Ray says of the job's state, without its output."""
        with explained_jobs(self.url):
            info = self._client.get_job_info(self.job_id)
        return f"{info.status}: {(info.message or '').partition(', last available logs')[0]}"

    def output(self) -> str:
        """All that the job has printed."""
        with explained_jobs(self.url):
            return str(self._client.get_job_logs(self.job_id))

    def follow(self, write: Callable[[str], None]) -> int:
        """Write the job's output as it comes. Returns its exit code.

        Raises: InfrastructureError: the dashboard does not answer any more.
        """
        written = 0
        heard_at = time.monotonic()

        async def stream() -> None:
            nonlocal written, heard_at
            seen = 0  # characters: each connection begins with the first
            async for text in self._client.tail_job_logs(self.job_id):
                seen += len(text)
                if seen > written:
                    write(text[written - seen :])
                    written, heard_at = seen, time.monotonic()

        while True:
            with suppress(Exception):  # the connection is lost: exit_code() says what it was
                asyncio.run(stream())
            try:
                code = self.exit_code()
                if code is not None:
                    write(self.output()[written:])  # what came after the last look
                    return code
                heard_at = time.monotonic()
            except InfrastructureError:
                if time.monotonic() - heard_at > _PATIENCE_S:
                    raise
            time.sleep(_POLL_S)


def _entrypoint(request: Request) -> str:
    """The shell command: `bmojo run` as it would be here, in the folder that stands for the current one.

    -P: the user's files are not modules that hide ours.
    """
    here = Path.cwd()
    folder = shlex.quote(str(JOB_FOLDER / here.relative_to(request.base)))
    config = os.path.relpath(request.config, here)
    command = ["run", "--restarts", str(request.restarts), config, *request.overrides]
    return f"mkdir -p {folder} && cd {folder} && exec python -P -m pipelines.job_main {shlex.join(command)}"

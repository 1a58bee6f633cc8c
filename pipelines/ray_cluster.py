"""The Ray cluster as the scheduler of a run knows it (pipelines.engine.processes.Cluster)."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from base.errors import UserError
from pipelines.cluster import LOOPBACK_ONLY, cluster_address, cpus_for, join, join_local, neuron_cores_for
from pipelines.cluster_process import ClusterReport, ClusterRequest
from pipelines.config import ClusterConfig
from pipelines.engine.events import Status
from pipelines.engine.failures import EXIT_RESUMABLE, EXIT_USER, Failure
from pipelines.engine.placement import ClusterNode
from pipelines.engine.processes import child_environment, python_module
from pipelines.engine.stage import StageConfig
from pipelines.errors import InfrastructureError, LostError

_START_S = 300.0
_END_S = 15.0


class RayCluster:
    """Started on this machine, or joined; by a process of its own, which is started again if it dies."""

    def __init__(self, config: ClusterConfig, stages: Iterable[StageConfig], storage: str) -> None:
        self._config = config
        self._storage = storage
        stages = list(stages)
        self._num_cpus = config.num_cpus or cpus_for(stages)
        self._address = cluster_address(config)
        self._num_neuron_cores = neuron_cores_for(stages) if self._address == "local" else 0
        self._process: subprocess.Popen[str] | None = None
        self._report = ClusterReport()
        self._was_there = False
        self._heard = threading.Condition()
        # The log of a stage has every line of its workers, without colours.
        self._environment = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
        if self._address == "local":
            # A token of the run's own: other users of this machine cannot use its cluster.
            self._environment |= LOOPBACK_ONLY | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for every process that joins it."""
        return self._environment

    def prepare(self) -> None:
        """Begin to start or join it."""
        if self._process is not None and self._process.poll() is None:
            return
        process = subprocess.Popen(
            python_module("pipelines.cluster_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(self._environment),
            start_new_session=True,
        )
        with self._heard:
            self._process, self._report = process, ClusterReport()
        assert process.stdin is not None
        request = ClusterRequest(
            cluster=self._config,
            num_cpus=self._num_cpus,
            num_neuron_cores=self._num_neuron_cores,
            storage=self._storage,
        )
        with suppress(BrokenPipeError):
            print(request.model_dump_json(), file=process.stdin, flush=True)
        threading.Thread(target=self._listen, args=(process,), name="cluster", daemon=True).start()

    def start(self) -> Callable[[], None]:
        """Wait until it is there. Returns what a stage's process calls to join it.

        Raises: UserError, InfrastructureError: as pipelines.cluster.ensure_cluster. LostError: its process died, or it
            was there for this run before and cannot be joined now.
        """
        self.prepare()
        with self._heard:
            heard = self._heard.wait_for(lambda: self._report != ClusterReport(), _START_S)
        report = self._report
        if report.failure is not None:
            error = _raised(report.failure)
            raise _gone(error) if self._was_there and isinstance(error, UserError) else error
        if not heard or report.address is None:
            raise LostError("The process that keeps the Ray cluster died. The same command resumes.")
        if self._address == "local":
            return partial(join_local, report.address)
        return partial(rejoin, self._address)

    def nodes(self) -> Sequence[ClusterNode]:
        """The machines there were a moment ago."""
        return [ClusterNode(machine.resources, machine.labels) for machine in self._report.machines]

    def is_lost(self) -> bool:
        """Whether it was there, and is no more."""
        return self._report.address is not None and self._process is not None and self._process.poll() is not None

    def close(self) -> None:
        """Leave it; end it if it was started for this run."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._take(process, ClusterReport.model_validate_json(line))
        if self._report == ClusterReport():
            self._take(process, ClusterReport(failure=_died()))

    def _take(self, process: subprocess.Popen[str], report: ClusterReport) -> None:
        """Believe a report, unless it is of a process that has a successor."""
        with self._heard:
            if process is self._process:
                self._report = report
                self._was_there |= report.address is not None
            self._heard.notify_all()


def rejoin(address: str) -> None:
    """Join a cluster that was there a moment ago: what is wrong now is not the address.

    Raises: LostError: its head has gone. InfrastructureError: it does not answer.
    """
    try:
        join(address)
    except UserError as error:
        raise _gone(error) from error


def _gone(error: Exception) -> LostError:
    return LostError(f"The Ray cluster that this run works on is gone. {error}")


def _died() -> Failure:
    text = "The process that keeps the Ray cluster died. The same command resumes."
    return Failure(Status.RESUMABLE, text, None, EXIT_RESUMABLE, may_pass=True, is_loss=True)


def _raised(failure: Failure) -> Exception:
    """The error that the cluster's process met."""
    if failure.is_loss:
        return LostError(failure.text)
    if failure.status is Status.RESUMABLE:
        return InfrastructureError(failure.text)
    return UserError(failure.text) if failure.exit_code == EXIT_USER else RuntimeError(failure.text)

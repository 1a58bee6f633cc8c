"""Use of the driver's machine, journalled beside the metrics of the running stage, under the names that MLflow's pages
expect.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import psutil

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.tracking.journal import Journal

DEFAULT_INTERVAL_S = 10.0
_MEGABYTE = 1e6
_STEP_OF = "system/cpu_utilization_percentage"

log = logging.getLogger(__name__)


class SystemMetrics:
    """Samples until stop(). One sample is one step; a resumed stage goes on counting."""

    def __init__(self, journal: Journal, disk_path: Path, interval_s: float = DEFAULT_INTERVAL_S) -> None:
        self._journal, self._disk_path, self._interval_s = journal, disk_path, interval_s
        last = journal.last_step(_STEP_OF)
        self._step = 0 if last is None else last + 1
        self._stopped = threading.Event()
        self._network_start = psutil.net_io_counters()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)

    def __enter__(self) -> SystemMetrics:
        psutil.cpu_percent()  # the first call only starts the interval
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def sample(self) -> dict[str, float]:
        """One reading."""
        memory, disk, network = (
            psutil.virtual_memory(),
            psutil.disk_usage(str(self._disk_path)),
            psutil.net_io_counters(),
        )
        return {
            _STEP_OF: psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/disk_usage_megabytes": disk.used / _MEGABYTE,
            "system/disk_usage_percentage": disk.percent,
            "system/disk_available_megabytes": disk.free / _MEGABYTE,
            "system/network_receive_megabytes": (network.bytes_recv - self._network_start.bytes_recv) / _MEGABYTE,
            "system/network_transmit_megabytes": (network.bytes_sent - self._network_start.bytes_sent) / _MEGABYTE,
        }

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self._journal.log_metrics(self._step, self.sample())
            except (InfrastructureError, UserError, OSError) as error:  # the next sample may find room again
                log.debug("A sample of the system's use is left out: %s", error)
            self._step += 1

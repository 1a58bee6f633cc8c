"""What tests of several packages share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when triton is first imported, which torch.compile does too: it must be set before any test module is. Nothing
# else here runs Triton kernels; a child process that compiles them for a GPU has to remove it. 0: test on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray cluster for the whole test session."""
    import ray

    # "local": never join a cluster that the developer happens to have running.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()

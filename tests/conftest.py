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


SHARED = ("finished_pipeline", "ray_cluster")
"""Fixtures that take long to set up: all tests that need one run in the same process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the tests among processes (`pytest -n 2 --dist loadgroup`): by shared fixture, else by file."""
    for item in items:
        needed = getattr(item, "fixturenames", ())
        group = next((name for name in SHARED if name in needed), item.nodeid.partition("::")[0])
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray cluster for the whole test session."""
    import ray

    # "local": never join a cluster that the developer happens to have running.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()

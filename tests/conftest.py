"""What tests of several packages share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when triton is first imported, which torch.compile does too: it must be set before any test module is. Nothing
# else here runs Triton kernels; a child process that compiles them for a GPU has to remove it. 0: test on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


_TOGETHER = {
    # What a machine has once: Ray's ports.
    "ray": (
        "tests/pipelines/end_to_end/",
        "tests/pipelines/stages/evaluate/",
        "tests/pipelines/stages/python/test_run.py",
        "tests/pipelines/stages/test_actors.py",
        "tests/pipelines/stages/tokenize/",
        "tests/pipelines/stages/train/guards/test_watchdog.py",
        "tests/pipelines/stages/train/test_run.py",
        "tests/pipelines/stages/train/test_start.py",
        "tests/pipelines/submit/",
        "tests/pipelines/tracking/test_notices.py",
        "tests/pipelines/tracking/test_remote.py",
    ),
    # Two processes that train are started once for all of these.
    "trainers": (
        "tests/pipelines/stages/train/backends/",
        "tests/pipelines/stages/train/guards/test_replicas.py",
        "tests/pipelines/stages/train/optimizers/test_muon.py",
        "tests/pipelines/stages/train/test_bare_loop.py",
        "tests/pipelines/stages/train/test_trainer.py",
    ),
}
"""Tests that run one after the other in one process, by the name of their part. The longest part comes first."""


def _part_of(nodeid: str) -> str:
    """One of the above, else the file."""
    named = (name for name, places in _TOGETHER.items() if nodeid.startswith(places))
    return next(named, nodeid.partition("::")[0])


class _Parts(LoadScopeScheduling):
    """Divides the tests among the processes of `pytest -n 3`: one part after another, in the order of the tests.

    Not xdist's own groups: those of 3.8 have no effect with pytest 9.2, whose node ids it cannot change.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _part_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # by the number of tests, which says little about their time
    return _Parts(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long parts first, so that no process is left with one at the end."""
    order = list(_TOGETHER)
    items.sort(key=lambda item: order.index(part) if (part := _part_of(item.nodeid)) in _TOGETHER else len(order))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray cluster for the whole test session."""
    import ray

    def start() -> None:
        # "local": never join a cluster that the developer happens to have running.
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)

    try:
        start()
    except Exception:  # on a busy machine a part may take longer than Ray waits: as pipelines/cluster.py, once more
        ray.shutdown()
        start()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def hf_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep transformers' copies of model code out of the user's cache."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    cache = str(tmp_path_factory.mktemp("hf_modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(hub, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield

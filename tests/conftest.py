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


_ONE_PER_MACHINE = (
    "tests/pipelines/end_to_end/",
    "tests/pipelines/stages/evaluate/",
    "tests/pipelines/stages/test_actors.py",
    "tests/pipelines/stages/train/",
    "tests/pipelines/stages/tokenize/",
    "tests/pipelines/submit/",
)
"""Tests that use what a machine has once: Ray's ports. They run one after the other."""


class _Parts(LoadScopeScheduling):
    """Divides the tests among the processes of `pytest -n 2`: all of the above are one part, else a file is one.

    Not xdist's own groups: those of 3.8 have no effect with pytest 9.2, whose node ids it cannot change.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "machine" if nodeid.startswith(_ONE_PER_MACHINE) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _Parts(config, log)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray cluster for the whole test session."""
    import ray

    # "local": never join a cluster that the developer happens to have running.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
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

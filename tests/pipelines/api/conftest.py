from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.api.driving import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two finished runs of one pipeline; do not change them."""
    world = World(tmp_path_factory.mktemp("finished"))
    assert world.run().code == 0
    assert world.run("second.scale=3.0").code == 0
    yield world
    world.close()

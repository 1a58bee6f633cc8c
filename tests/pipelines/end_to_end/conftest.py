"""The one run that most end-to-end tests look at."""

from __future__ import annotations

import pytest

from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline, write_pipeline


@pytest.fixture(scope="session")
def finished_pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyPipeline, Finished]:
    """A pipeline that ran once without a break."""
    pipeline = write_pipeline(tmp_path_factory.mktemp("finished"))
    finished = pipeline.run()
    assert finished.code == 0, finished.output
    return pipeline, finished

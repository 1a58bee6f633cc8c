"""The example that trains on images: its file loads, and its documents are what the file says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pipelines.loading import load_pipeline
from pipelines.stages.python.sources import find_sources
from pipelines.stages.tokenize.stage import TokenizeStageConfig

FOLDER = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", FOLDER / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_tells_how_many_ids_there_are(digits: ModuleType) -> None:
    config = load_pipeline(FOLDER / "pipeline.yaml")
    pixels = config.stages["pixels"]
    assert isinstance(pixels, TokenizeStageConfig)
    assert pixels.source.vocabulary == (digits.EOD + 1, digits.EOD, False)
    assert pixels.seq_len % (1 + 1 + digits.SIDE**2) == 0, "whole digits, each behind an end"
    assert find_sources(config.stages["draw"]).digests  # type: ignore[arg-type]


def test_a_digit_is_its_label_and_its_pixels(digits: ModuleType) -> None:
    pytest.importorskip("sklearn")
    ids = digits.ids_of_digits()
    assert ids.shape == (1797, 1 + digits.SIDE**2)
    assert np.array_equal(np.unique(ids[:, 0]), np.arange(digits.NUM_SHADES, digits.EOD))
    assert ids[:, 1:].max() == digits.NUM_SHADES - 1

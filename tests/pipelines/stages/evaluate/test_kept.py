"""Results of tasks are there as they were written, or not at all."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from base.errors import DamagedError
from pipelines.stages.evaluate.kept import keep, kept, pack, unpack
from pipelines.stages.evaluate.measures.figures import text_array, texts_of
from pipelines.storage.artifact import ArtifactDir

RESULT = {"nll": np.array([[1.5, 2.5], [0.0, np.nan]]), "document": np.arange(2), "name": np.array(["a", "ü"])}


def test_a_kept_result_is_read_as_it_was(tmp_path: Path) -> None:
    artifact = ArtifactDir.at(tmp_path)
    keep(artifact, "text", "0-model-00000000", RESULT)
    keep(artifact, "text", "no longer a task", RESULT)
    found = kept(artifact, "text", ["0-model-00000000", "0-model-00000032"])
    assert list(found) == ["0-model-00000000"]
    assert found["0-model-00000000"].keys() == RESULT.keys()
    for name, array in found["0-model-00000000"].items():
        np.testing.assert_array_equal(array, RESULT[name])
        assert array.dtype == RESULT[name].dtype
    assert kept(artifact, "position", ["0-000000"]) == {}


@pytest.mark.parametrize("position", [60, 300, -200, -1])
def test_a_damaged_result_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, position: int) -> None:
    artifact = ArtifactDir.at(tmp_path)
    keep(artifact, "text", "0", RESULT)
    (file,) = tmp_path.rglob("0.npz")
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = kept(artifact, "text", ["0"])
    if found:  # a byte that means nothing
        assert all(np.array_equal(found["0"][name], RESULT[name], equal_nan=name == "nll") for name in RESULT)
    else:
        assert "damaged" in caplog.text
    file.write_bytes(data[:100])
    assert kept(artifact, "text", ["0"]) == {}


@pytest.mark.parametrize("name", [*RESULT, "more"])
def test_arrays_that_are_not_those_of_the_digest_are_refused(tmp_path: Path, name: str) -> None:
    """A whole file with other arrays, which no checksum of its format finds."""
    file = tmp_path / "x.npz"
    file.write_bytes(pack(RESULT))
    with np.load(file) as found:
        arrays = dict(found)
    np.savez(file, **arrays | {name: np.arange(2, dtype=np.int32)})
    with pytest.raises(DamagedError, match="does not match the digest in it"):
        unpack(file.read_bytes(), "x")


def test_objects_are_not_kept() -> None:
    with pytest.raises(ValueError, match="array of objects"):
        pack({"x": np.array([None])})


def test_texts_keep_every_character() -> None:
    texts = ["", "a\0", "\0", "naïve ☕\n", '"']
    assert texts_of(text_array(texts)) == texts

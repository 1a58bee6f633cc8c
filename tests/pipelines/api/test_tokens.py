"""Samples of token ids that are no text, as `bmojo data show` prints them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.config import SyntheticSource, TokenizeFields, TokensSource
from data.tasks.mad import Memorization
from pipelines.api.tokens import show_samples
from pipelines.storage.artifact import ArtifactDir
from tests.data.here import tokenize_here


def test_ids_that_are_no_text_are_shown_as_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(8).reshape(2, 4))
    source = TokensSource(kind="tokens", paths=(str(tmp_path / "ids.npy"),), vocab_size=8)
    tokenize_here(None, TokenizeFields(source=source, seq_len=16, validation_fraction=0), tmp_path / "out")
    (sample,) = show_samples(ArtifactDir.at(tmp_path / "out"), "train", [0])
    assert ["".join(piece.tokens) for piece in sample.pieces] == ["0 1 2 3 end ", "4 5 6 7 end "]


def test_answers_of_a_task_are_marked(tmp_path: Path) -> None:
    task = Memorization(kind="memorization", num_keys=4, num_pairs=2)
    source = SyntheticSource(kind="synthetic", task=task, num_documents=1)
    tokenize_here(None, TokenizeFields(source=source, seq_len=16, validation_fraction=0), tmp_path)
    (sample,) = show_samples(ArtifactDir.at(tmp_path), "train", [0])
    (piece,) = sample.pieces
    document = task.draw(np.random.default_rng((0, 0)))
    marked = [f"{'=' * answer}{token} " for token, answer in zip(document.tokens, document.is_answer, strict=True)]
    assert list(piece.tokens) == [*marked, "end "]

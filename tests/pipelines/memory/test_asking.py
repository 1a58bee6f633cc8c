"""Questions side by side: each row's answer and sources are those it has alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.memory.asking import Asked, StoredMemory
from pipelines.memory.remembering import remember_files
from pipelines.stages.evaluate.language_model import Drawing
from pipelines.storage import open_storage
from tests.pipelines.memory.stores import TOKENIZER, identity, store_of, text_files
from tests.pipelines.stages.trained_run import tiny_model


def test_sources_of_a_row_that_has_ended_do_not_change(tmp_path: Path) -> None:
    """It is fed its last token until the others end."""
    model, store = tiny_model(), store_of(open_storage(tmp_path / "store"))
    remember_files(store, model, TOKENIZER, text_files(tmp_path / "texts", 3))
    memory = StoredMemory(store, model, identity(model))
    drawing, queries, start = Drawing(12, temperature=0), [[5, 6, 7], [8]], [TOKENIZER.eod_id]

    def drawn(rows: list[list[int]], stop: tuple[int, ...]) -> tuple[Asked, list[list[int]]]:
        asked = Asked(model, memory, rows, start)
        return asked, [tokens_b.tolist() for tokens_b in asked.draw(drawing, stop)]

    _, free = drawn(queries, ())
    first, second = zip(*free, strict=True)
    stop = next(token for token in first[:6] if token not in second)
    both, _ = drawn(queries, (stop,))
    for row, query in enumerate(queries):
        alone, tokens = drawn([query], (stop,))
        assert len(tokens) == (12 if row else first.index(stop) + 1)
        found = {one.record.id: one.attention for one in both.sources(row)}
        assert found == pytest.approx({one.record.id: one.attention for one in alone.sources()}, rel=1e-5)
        assert found

"""The benchmark of long-term memory, with a model that was hardly trained: what is asked, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import _store_report as store_report
from benchmarks import store
from benchmarks._store_training import TASK, Training

SETTING = store.Setting(distances=(64, 192), num_fact_documents=2, num_composed=1)


def test_keys_of_facts_stand_in_no_later_document() -> None:
    library = store.Library(SETTING, seed=0)
    assert (len(library.facts), len(library.later)) == (2, 3)
    assert {len(document) for document in (*library.facts, *library.later)} == {64}
    later = {token for document in library.later for token in document}
    for fact, questions, answers in zip(library.facts, library.questions, library.answers, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            key = question[-1]
            assert key not in later
            assert fact.count(key) == 1
            assert fact[fact.index(key) + 1] == answer
            assert min(question[:-1]) >= TASK.vocab_size // 2 > key


@pytest.mark.ci
def test_everything_is_asked_counted_and_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training("hybrid", recall=replace(TASK, steps=1))
    record = store.measure(training, SETTING, tmp_path)
    rows = {(row["how"], row["distance"]): row for row in record["rows"]}
    hows = ("store, 1 document per token", "store, 4 documents per token", "found text in front", "no store")
    assert {key for key in rows if key[0] in hows} == {(how, at) for how in hows for at in (64, 192)}
    assert all(row["asked"] == (8 if "begin" in how else 16) for (how, _), row in rows.items())
    assert record["bytes_per_document"] > record["eidetic_bytes"] > 0
    monkeypatch.setattr(store.Bench, "with_store", lambda *_: pytest.fail("a row was measured again"))
    assert store.measure(training, SETTING, tmp_path) == record
    with pytest.raises(SystemExit, match="Give another --out"):
        store.measure(training, replace(SETTING, num_composed=2), tmp_path)
    page = store_report.table([record, {**record, "seed": 1}])
    assert "### hybrid (seeds 0, 1)" in page
    assert "| no store |" in page


def test_intervals_are_wilsons() -> None:
    assert store_report.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert store_report.wilson(0, 10)[0] == 0

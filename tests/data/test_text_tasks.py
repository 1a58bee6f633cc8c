"""Tasks in words: a solver that reads the prompt alone finds every answer, and nothing easier does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.tasks.mad import InContextRecall, Memorization
from data.tasks.mqar import Mqar
from data.tasks.retrieval import Needle
from data.tasks.state_tracking import S5, Parity
from data.tasks.text.example import NOWHERE, CountTokens, TextExample, choose_others
from data.tasks.text.extraction import Extraction
from data.tasks.text.needle import TextNeedle
from data.tasks.text.phonebook import TextPhonebook
from data.tasks.text.rendered import Rendered


class Draws(Protocol):
    def draw(self, rng: np.random.Generator, count: CountTokens) -> TextExample: ...


Solver = Callable[[str], str]
"""What follows a prompt."""


def count(text: str) -> int:
    """A tokenizer of words and signs."""
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


def needle(prompt: str) -> str:
    *lines, question = prompt.split("\n")
    found = re.search(r"What (?:is|are all) the special magic \w+ for (\S+) mentioned", question)
    assert found
    values = [line.split(" is: ")[1].rstrip(".") for line in lines if f" for {found[1]} is: " in line]
    return f" {values[question.count(',')]}"


def phonebook(prompt: str) -> str:
    book, shown, asked = prompt.split("\n\n")
    entries = dict(line.split(": ") for line in book.split("\n"))
    assert all(entries[line.split(": ")[0]] == line.split(": ")[1] for line in shown.split("\n"))
    assert asked.rstrip(":") not in shown
    return f" {entries[asked.rstrip(':')]}"


def extraction(prompt: str) -> str:
    report, asked = prompt.split("\n\n")
    return next(line.removeprefix(asked) for line in report.split("\n") if line.startswith(asked))


def mqar(prompt: str) -> str:
    words = prompt.split("\n")[-1].split()
    return f" {words[words.index(words[-1]) + 1]}"


def parity(prompt: str) -> str:
    return f" {prompt.split(chr(10))[-1].split()[:-1].count('1') % 2}"


def s5(prompt: str) -> str:
    state = "abcde"
    for word in prompt.split("\n")[-1].split()[:-1]:
        state = "".join(state["abcde".index(letter)] for letter in word)
    return f" {state}"


def text_needle(**fields: object) -> TextNeedle:
    return TextNeedle.model_validate({"kind": "text_needle", **fields})


TASKS: dict[str, tuple[Draws, Solver]] = {
    "single": (text_needle(num_tokens=300), needle),
    "multi-key": (text_needle(num_keys=4), needle),
    "many keys": (text_needle(num_keys=12, num_tokens=600), needle),
    "multi-value": (text_needle(num_values=4, num_tokens=500), needle),
    "keys and values": (text_needle(num_keys=8, num_values=2, num_choices=6), needle),
    "needles": (text_needle(haystack="needles"), needle),
    "uuids": (text_needle(haystack="needles", keys="uuids", values="uuids"), needle),
    "words": (text_needle(keys="numbers", values="words", num_tokens=200), needle),
    "phonebook": (TextPhonebook(kind="text_phonebook"), phonebook),
    "three entries": (TextPhonebook(kind="text_phonebook", num_entries=3, num_choices=3), phonebook),
    "extraction": (Extraction(kind="extraction"), extraction),
    "rendered mqar": (Rendered(Mqar(kind="mqar"), 1, 8), mqar),
    "rendered parity": (Rendered(Parity(kind="parity"), 3, 8), parity),
    "rendered s5": (Rendered(S5(kind="s5", max_length=6), 0, 8), s5),
}
PARAMETERS = pytest.mark.parametrize(("task", "solver"), TASKS.values(), ids=TASKS)
NUM_TOKENS = {"text_needle", "extraction"}


def examples(task: Draws, number: int) -> list[TextExample]:
    return [task.draw(np.random.default_rng((7, seed)), count) for seed in range(number)]


@PARAMETERS
def test_a_solver_that_reads_the_prompt_finds_the_answer(task: Draws, solver: Solver) -> None:
    for example in examples(task, 20):
        assert solver(example.prompt) == example.answer
        assert not example.prompt[-1].isspace()
        assert example.answer[0] == " "
        assert not example.answer[1].isspace()


@PARAMETERS
def test_the_source_is_where_the_answer_is_written(task: Draws, solver: Solver) -> None:
    for example in examples(task, 20):
        if isinstance(task, Rendered) and isinstance(task.task, Parity | S5):
            last_line = example.prompt.rindex("\n") + 1 if "\n" in example.prompt else 0
            assert example.source == last_line
        else:
            assert example.prompt[example.source :].startswith(example.answer[1:])
            if not isinstance(task, Rendered):  # there other pairs may hold the same value
                assert example.prompt.count(example.answer[1:]) == 1, "written once, so nowhere behind the question"


@PARAMETERS
def test_wrong_answers_are_of_the_same_kind_and_wrong(task: Draws, solver: Solver) -> None:
    for example in examples(task, 20):
        choices = [example.answer, *example.others]
        assert len(set(choices)) == len(choices) >= 2
        in_prompt = [other[1:] in example.prompt for other in example.others]
        assert in_prompt == sorted(in_prompt, reverse=True), "those of the prompt first"
        is_worked_out = isinstance(task, Rendered) and isinstance(task.task, Parity | S5)
        if not is_worked_out and len(example.others) <= sum(in_prompt):
            assert all(in_prompt)


@PARAMETERS
def test_examples_follow_from_the_seed(task: Draws, solver: Solver) -> None:
    first, again = examples(task, 10), examples(task, 10)
    assert first == again
    assert len({example.prompt for example in first}) == len(first)


@pytest.mark.parametrize("name", ["single", "multi-key", "multi-value", "needles", "uuids", "extraction"])
def test_prompts_are_filled_up_to_their_length_and_not_beyond(name: str) -> None:
    task, _ = TASKS[name]
    assert isinstance(task, TextNeedle | Extraction)
    for example in examples(task, 20):
        assert 0.85 * task.num_tokens <= count(example.prompt) <= task.num_tokens


@pytest.mark.parametrize("name", ["single", "multi-key", "extraction"])
def test_answers_stand_at_all_depths(name: str) -> None:
    task, _ = TASKS[name]
    depths = [example.source / len(example.prompt) for example in examples(task, 200)]
    found, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert (found > 25).all(), found


@PARAMETERS
def test_constant_guesses_are_right_as_often_as_chance_says(task: Draws, solver: Solver) -> None:
    """Guessers that do not read the prompt: the first, the last in the alphabet, and the one with the median place."""
    drawn = examples(task, 300)
    chance = float(np.mean([1 / (1 + len(example.others)) for example in drawn]))
    for place in (0, -1, None):
        right = []
        for example in drawn:
            choices = sorted([example.answer, *example.others])
            right.append(choices[len(choices) // 2 if place is None else place] == example.answer)
        spread = 4 * (chance * (1 - chance) / len(drawn)) ** 0.5
        assert abs(np.mean(right) - chance) < spread, place


@pytest.mark.parametrize("name", ["many keys", "needles", "uuids", "phonebook", "extraction", "rendered mqar"])
def test_to_know_what_occurs_in_the_prompt_is_not_enough(name: str) -> None:
    task, _ = TASKS[name]
    for example in examples(task, 20):
        assert all(other[1:] in example.prompt for other in example.others)


@settings(max_examples=40, deadline=None)
@given(
    num_keys=st.integers(1, 9), num_values=st.integers(1, 5), num_tokens=st.integers(900, 1500),
    haystack=st.sampled_from(["noise", "needles"]), values=st.sampled_from(["numbers", "words", "uuids"]),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_needles_can_be_found(
    num_keys: int, num_values: int, num_tokens: int, haystack: str, values: str, seed: int
) -> None:
    task = text_needle(
        num_keys=num_keys, num_values=num_values, num_tokens=num_tokens, haystack=haystack, values=values
    )
    try:
        example = task.draw(np.random.default_rng(seed), count)
    except DataError:
        assert num_keys * num_values > 12
        return
    assert needle(example.prompt) == example.answer
    assert example.prompt[example.source :].startswith(example.answer[1:])
    assert count(example.prompt) <= num_tokens


@settings(max_examples=40, deadline=None)
@given(num_pairs=st.integers(2, 12), shown=st.integers(0, 3), choices=st.integers(2, 9), seed=st.integers(0, 2**32))
def test_rendered_documents_keep_distances(num_pairs: int, shown: int, choices: int, seed: int) -> None:
    """The number of words from the source to the end is the distance in tokens of the document."""
    task = InContextRecall(kind="in_context_recall", num_pairs=num_pairs, num_keys=4, num_values=6)
    rng = np.random.default_rng(seed)
    example = Rendered(task, shown, choices).draw(rng, count)
    again = np.random.default_rng(seed)
    for _ in range(shown):
        task.draw(again)
    _, is_answer, source = task.draw(again)
    words = example.prompt[example.source :].split()
    at = len(example.prompt.split("\n")[-1].split())
    assert is_answer[at]
    assert len(words) == at - source[at]
    assert f" {words[0]}" == example.answer
    assert len(example.others) == min(choices, 6) - 1


def test_multi_values_are_asked_for_in_their_order() -> None:
    places = {needle_number(example) for example in examples(text_needle(num_values=4), 100)}
    assert places == {0, 1, 2, 3}


def needle_number(example: TextExample) -> int:
    return example.prompt.split("\n")[-1].count(",")


def test_what_has_no_room_is_an_error_that_says_how_much_it_takes() -> None:
    with pytest.raises(
        DataError, match=r"num_tokens=16 has no room for the needles and the question, which takes \d\d"
    ):
        text_needle(num_tokens=16).draw(np.random.default_rng(0), count)


def test_a_task_that_only_training_teaches_is_not_asked_of_a_model_of_text() -> None:
    with pytest.raises(ValueError, match="only training could teach"):
        Rendered(Memorization(kind="memorization"), 0, 8)


def test_a_rendered_needle_may_hold_several_answers() -> None:
    task = Rendered(Needle(kind="needle", num_values=3, noise_tokens=20), 1, 8)
    assert NOWHERE not in [example.source for example in examples(task, 5)]


def test_others_come_from_the_first_group_before_the_next() -> None:
    rng = np.random.default_rng(0)
    assert set(choose_others(rng, "a", [["a", "b", "c"], ["d", "e"]], 3)) - {"d", "e"} == {"b", "c"}
    assert choose_others(rng, "a", [["a"], ["a"]], 3) == []

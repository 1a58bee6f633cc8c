"""Which copies there are, and which copy reads which: by property, on graphs of any form."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import is_stage_name
from pipelines.config_errors import FieldOrigins
from pipelines.foreach.expansion import expand_foreach, template_of

Stages = dict[str, dict[str, Any]]


def expanded(stages: Stages) -> Stages:
    found = expand_foreach({"stages": copy.deepcopy(stages)}, FieldOrigins("file.yaml"))["stages"]
    assert isinstance(found, dict)
    return found


@st.composite
def graphs(draw: st.DrawFn) -> Stages:
    """Stages s0, s1, ... that need some of those before them, whole or copy by copy; some vary a field `v`."""
    stages: Stages = {}
    has_copies: dict[str, bool] = {}
    for name in (f"s{number}" for number in range(draw(st.integers(1, 5)))):
        stage: dict[str, Any] = {"needs": []}
        for other in stages:
            form = draw(st.sampled_from(["", "plain", "gather"]))
            if form:
                stage["needs"].append(f"{other}[*]" if form == "gather" and has_copies[other] else other)
        if draw(st.booleans()):
            stage["foreach"] = {"v": draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))}
        has_copies[name] = "foreach" in stage or any(has_copies.get(other, False) for other in stage["needs"])
        stages[name] = stage
    return stages


def along(stages: Stages, name: str) -> set[str]:
    """A stage and those whose copies it has: what it needs copy by copy."""
    return {name}.union(*(along(stages, other) for other in stages[name]["needs"] if "[" not in other))


def template(name: str) -> str:
    return name.partition("-")[0]


def paths_to(stages: Stages, found: Stages, name: str) -> Iterator[str]:
    """The copy and, over every path of needs copy by copy, the copies that it stems from."""
    yield name
    gathered = {other.removesuffix("[*]") for other in stages[template(name)]["needs"] if "[" in other}
    for other in found[name]["needs"]:
        if template(other) not in gathered:
            yield from paths_to(stages, found, other)


def values(stages: Stages, found: Stages, name: str) -> Mapping[str, int]:
    """The values that a copy stems from, by the stage that varies them."""
    return {template(other): found[other]["v"] for other in paths_to(stages, found, name) if "v" in found[other]}


@given(graphs())
def test_there_is_one_copy_per_combination(stages: Stages) -> None:
    found = expanded(stages)
    for name in stages:
        copies = [other for other in found if template(other) == name]
        varied = [stages[other]["foreach"]["v"] for other in along(stages, name) if "foreach" in stages[other]]
        assert len(copies) == prod(map(len, varied))
        assert len({tuple(sorted(values(stages, found, other).items())) for other in copies}) == len(copies)
        assert all(is_stage_name(other) for other in copies)
        assert (copies == [name]) == (not varied)


@given(graphs())
def test_a_copy_stems_from_one_copy_of_each_stage(stages: Stages) -> None:
    found = expanded(stages)
    for name in found:
        stems_from = set(paths_to(stages, found, name))
        assert len({template(other) for other in stems_from}) == len(stems_from)


@given(graphs())
def test_a_copy_gathers_all_copies_that_it_does_not_contradict(stages: Stages) -> None:
    found = expanded(stages)
    for name in found:
        own = values(stages, found, name)
        for entry in stages[template(name)]["needs"]:
            target = entry.removesuffix("[*]")
            read = [other for other in found[name]["needs"] if template(other) == target]
            assert read == [
                other
                for other in found
                if template(other) == target
                and all(own.get(stage, value) == value for stage, value in values(stages, found, other).items())
            ]


@given(graphs(), st.data())
def test_a_further_value_leaves_the_other_copies_as_they_are(stages: Stages, data: st.DataObject) -> None:
    varied = [name for name, stage in stages.items() if "foreach" in stage]
    if not varied:
        return
    more = copy.deepcopy(stages)
    name = data.draw(st.sampled_from(varied))
    place = data.draw(st.integers(0, len(stages[name]["foreach"]["v"])))
    more[name]["foreach"]["v"].insert(place, 10)
    before, after = expanded(stages), expanded(more)
    for other, stage in before.items():
        gathers = any("[" in entry for entry in stages[template(other)]["needs"])
        assert after[other] | {"needs": []} == stage | {"needs": []}
        assert set(stage["needs"]) <= set(after[other]["needs"])
        assert gathers or stage["needs"] == after[other]["needs"]


@given(graphs())
def test_stages_stay_in_their_order_and_a_file_without_copies_as_it_is(stages: Stages) -> None:
    found = expanded(stages)
    assert list(dict.fromkeys(map(template, found))) == list(stages)
    assert all(template_of(stages, name) == template(name) for name in found)
    plain = {name: {"needs": []} for name in stages}
    assert expanded(plain) == plain


def test_names_say_the_values_in_the_order_of_the_fields() -> None:
    found = expanded(
        {
            "tokens": {"foreach": {"seq_len": [64, 128]}},
            "train": {"needs": ["tokens"], "foreach": {"model": ["swa-130m"], "seed": [0, 1]}},
            "evaluate": {"needs": {"trained": "train", "tokens": "tokens"}, "foreach": {"batch_size": {"few": 10}}},
        }
    )
    assert list(found) == [
        "tokens-64",
        "tokens-128",
        "train-64-swa-130m-0",
        "train-64-swa-130m-1",
        "train-128-swa-130m-0",
        "train-128-swa-130m-1",
        "evaluate-64-swa-130m-0-few",
        "evaluate-64-swa-130m-1-few",
        "evaluate-128-swa-130m-0-few",
        "evaluate-128-swa-130m-1-few",
    ]
    assert found["evaluate-128-swa-130m-0-few"] == {
        "needs": {"trained": "train-128-swa-130m-0", "tokens": "tokens-128"},
        "batch_size": 10,
    }


def test_stages_with_different_foreach_are_multiplied_and_those_with_the_same_matched() -> None:
    found = expanded(
        {
            "tokens": {"foreach": {"seq_len": [64, 128]}},
            "train": {"foreach": {"seed": [0, 1]}},
            "export": {"needs": ["train"]},
            "evaluate": {"needs": ["export", "train", "tokens"]},
        }
    )
    assert {name: stage["needs"] for name, stage in found.items() if name.startswith("evaluate")} == {
        "evaluate-0-64": ["export-0", "train-0", "tokens-64"],
        "evaluate-0-128": ["export-0", "train-0", "tokens-128"],
        "evaluate-1-64": ["export-1", "train-1", "tokens-64"],
        "evaluate-1-128": ["export-1", "train-1", "tokens-128"],
    }


def test_a_subset_is_chosen_by_values() -> None:
    found = expanded(
        {
            "tokens": {"foreach": {"seed": [7]}},
            "train": {"needs": ["tokens"], "foreach": {"model": ["a", "1.4b"], "seed": [0, 1]}},
            "report": {"needs": ["train[model=a]", "train[ model = 1.4b, train.seed = 1 ]"]},
            "export": {"needs": {"trained": "train[model=a,train.seed=0]"}},
        }
    )
    assert found["report"]["needs"] == ["train-7-a-0", "train-7-a-1", "train-7-1_4b-1"]
    assert found["export"]["needs"] == {"trained": "train-7-a-0"}

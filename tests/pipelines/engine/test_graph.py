"""Which stage has which role, said by roles or left to the kinds of the stages in a list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.engine.fingerprint import differences
from pipelines.engine.graph import Role, roles_of, stage_graph
from pipelines.engine.plan import plan
from pipelines.engine.stage import (
    AnyNode,
    NamedInputs,
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.errors import FieldError
from pipelines.storage import open_storage


class LeafConfig(StageConfig):
    kind: Literal["leaf"] = "leaf"
    number: int = 0


class Leaf(Stage[LeafConfig, StageInputs, StageOutput]):
    code_version = 1

    def run(self, config: LeafConfig, inputs: StageInputs, context: StageContext) -> StageOutput:
        raise NotImplementedError


class ChainConfig(StageConfig):
    kind: Literal["chain"] = "chain"


@dataclass(frozen=True)
class ChainInputs(StageInputs):
    leaf: StageNode[Leaf]
    before: StageNode[Chain] | None = None


class Chain(Stage[ChainConfig, ChainInputs, StageOutput]):
    code_version = 1

    def run(self, config: ChainConfig, inputs: ChainInputs, context: StageContext) -> StageOutput:
        raise NotImplementedError


class BunchConfig(StageConfig):
    kind: Literal["bunch"] = "bunch"


@dataclass(frozen=True)
class BunchInputs(StageInputs):
    chains: tuple[StageNode[Chain], ...]
    leaves: tuple[StageNode[Leaf], ...] = ()


class Bunch(Stage[BunchConfig, BunchInputs, StageOutput]):
    code_version = 1

    def run(self, config: BunchConfig, inputs: BunchInputs, context: StageContext) -> StageOutput:
        raise NotImplementedError


class DuelConfig(StageConfig):
    kind: Literal["duel"] = "duel"


@dataclass(frozen=True)
class DuelInputs(StageInputs):
    champion: StageNode[Leaf]
    challenger: StageNode[Leaf] | None = None


class Duel(Stage[DuelConfig, DuelInputs, StageOutput]):
    """Two roles read one kind."""

    code_version = 1

    def run(self, config: DuelConfig, inputs: DuelInputs, context: StageContext) -> StageOutput:
        raise NotImplementedError


class FreeConfig(StageConfig):
    kind: Literal["free"] = "free"


class Free(Stage[FreeConfig, NamedInputs, StageOutput]):
    """Reads stages of any kind under names of its own."""

    code_version = 1

    def run(self, config: FreeConfig, inputs: NamedInputs, context: StageContext) -> StageOutput:
        raise NotImplementedError


KINDS = (Leaf(), Chain(), Bunch(), Duel(), Free())
LEAVES: dict[str, StageConfig] = {"a": LeafConfig(number=1), "b": LeafConfig(number=2)}


def graph_of(**stages: StageConfig) -> dict[str, AnyNode]:
    return {node.name: node for node in stage_graph(LEAVES | stages, KINDS)}


def digests_of(stages: dict[str, StageConfig]) -> dict[str, str]:
    planned = plan(stage_graph(LEAVES | stages, KINDS), open_storage("/nowhere"))
    return {stage.name: stage.fingerprint.digest for stage in planned}


def test_roles_follow_from_the_annotations() -> None:
    assert roles_of(ChainInputs) == (
        Role("leaf", "leaf", is_many=False, is_optional=False),
        Role("before", "chain", is_many=False, is_optional=True),
    )
    assert roles_of(BunchInputs) == (
        Role("chains", "chain", is_many=True, is_optional=False),
        Role("leaves", "leaf", is_many=True, is_optional=True),
    )
    assert roles_of(StageInputs) == ()


def test_an_annotation_that_is_no_role_is_refused() -> None:
    @dataclass(frozen=True)
    class Wrong(StageInputs):
        number: int

    with pytest.raises(TypeError, match="number: found <class 'int'>"):
        roles_of(Wrong)


def test_a_stage_finds_its_inputs_by_role_with_their_settings() -> None:
    graph = graph_of(one=ChainConfig(needs=("a",)), two=ChainConfig(needs=("one", "b")))
    inputs = graph["two"].inputs
    assert (inputs.leaf.name, inputs.leaf.config.number) == ("b", 2)
    assert (inputs.before.name, inputs.before.inputs.leaf.name) == ("one", "a")
    assert graph["one"].inputs.before is None
    with pytest.raises(RuntimeError, match="'b' has not finished"):
        _ = inputs.leaf.output


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_list_and_roles_give_the_same_fingerprints(data: st.DataObject) -> None:
    listed: dict[str, StageConfig] = {}
    said: dict[str, StageConfig] = {}

    def add(name: str, config_type: type[StageConfig], roles: dict[str, list[str]]) -> None:
        """In both forms; the list in any order that keeps that of the stages of one kind."""
        waiting = {role: list(names) for role, names in roles.items()}
        names: list[str] = []
        while left := sorted(role for role in waiting if waiting[role]):
            names.append(waiting[data.draw(st.sampled_from(left))].pop(0))
        listed[name] = config_type.model_validate({"needs": names})
        needs: dict[str, Any] = {}
        for role in data.draw(st.permutations(sorted(roles))):
            stands_alone = len(roles[role]) == 1 and data.draw(st.booleans())
            needs[role] = roles[role][0] if stands_alone else roles[role]
        said[name] = config_type.model_validate({"needs": needs})

    chains: list[str] = []
    for number in range(data.draw(st.integers(1, 4))):
        before = data.draw(st.lists(st.sampled_from(chains), max_size=1)) if chains else []
        add(f"chain{number}", ChainConfig, {"leaf": [data.draw(st.sampled_from(["a", "b"]))], "before": before})
        chains.append(f"chain{number}")
    read = data.draw(st.lists(st.sampled_from(chains), min_size=1, unique=True))
    add("bunch", BunchConfig, {"chains": read, "leaves": data.draw(st.lists(st.sampled_from("ab"), unique=True))})

    assert digests_of(listed) == digests_of(said)
    assert {name: type(config).model_validate(config.model_dump(mode="json")) for name, config in said.items()} == said


def test_roles_of_one_kind_are_told_apart() -> None:
    swapped = DuelConfig(needs={"challenger": "a", "champion": "b"})
    configs = [DuelConfig(needs={"champion": "a", "challenger": "b"}), swapped, DuelConfig(needs={"champion": "a"})]
    assert len({digests_of({"x": config})["x"] for config in configs}) == 3
    inputs = graph_of(x=swapped)["x"].inputs
    assert (inputs.champion.name, inputs.challenger.name) == ("b", "a")


def test_a_stage_may_read_any_kind_under_names_of_its_own() -> None:
    chain = ChainConfig(needs=("a",))
    graph = graph_of(chain=chain, free=FreeConfig(needs={"one": "chain", "several": ("a", "b")}))
    by_name = graph["free"].inputs.by_name
    assert (by_name["one"].name, by_name["one"].inputs.leaf.name) == ("chain", "a")
    assert [node.name for node in by_name["several"]] == ["a", "b"]
    assert list(graph_of(chain=chain, free=FreeConfig(needs=("b", "chain")))["free"].inputs.by_name) == ["b", "chain"]
    assert graph_of(free=FreeConfig())["free"].inputs.by_name == {}


def test_the_names_that_a_stage_gives_its_inputs_count_and_those_of_the_stages_do_not() -> None:
    def digest(needs: Any, name: str = "chain") -> str:
        return digests_of({name: ChainConfig(needs=("a",)), "free": FreeConfig(needs=needs)})["free"]

    first = digest({"x": "a", "y": "chain"})
    assert digest({"x": "a", "y": "renamed"}, "renamed") == digest({"y": "chain", "x": "a"}) == first
    assert digest(("a", "chain")) == digest({"a": "a", "chain": "chain"})
    others = [digest({"y": "a", "x": "chain"}), digest({"z": "a", "y": "chain"}), digest(("a", "chain"))]
    assert len({first, *others}) == 4
    parts = {
        name: plan(stage_graph(LEAVES | {"free": FreeConfig(needs={name: "a"})}, KINDS), open_storage("/nowhere"))[-1]
        for name in ("x", "z")
    }
    assert differences(parts["x"].fingerprint.parts, parts["z"].fingerprint.parts) == ["the names of the inputs"]


@pytest.mark.parametrize(
    ("config", "field", "problem"),
    [
        (DuelConfig(needs=("a",)), "needs", "'a' may be champion or challenger. Say which: {champion: a}."),
        (
            DuelConfig(needs={"champion": ("a", "b")}),
            "needs.champion",
            "found 2 stages of kind leaf, expected exactly 1. This pipeline's leaf stages: a, b.",
        ),
        (
            DuelConfig(needs={"challenger": "a"}),
            "needs",
            "role champion: found 0 stages of kind leaf, expected exactly 1. This pipeline's leaf stages: a, b.",
        ),
        (ChainConfig(needs=("a", "b")), "needs", "found 2 stages of kind leaf, expected exactly 1. This pipeline's"),
        (
            BunchConfig(needs=("a",)),
            "needs",
            "found 0 stages of kind chain, expected at least 1. This pipeline's chain ",
        ),
        (
            BunchConfig(needs={"chains": "a"}),
            "needs.chains",
            "'a' is a leaf stage, expected at least 1 of kind chain. This pipeline's chain stages: none.",
        ),
        (
            FreeConfig(needs={"several": ()}),
            "needs.several",
            "found 0 stages, expected at least 1. This pipeline's other stages: a, b.",
        ),
        (LeafConfig(needs={"x": "a"}), "needs.x", "a leaf stage has no role 'x'. Its roles: none, it reads no other"),
        (LeafConfig(needs=("a",)), "needs", "'a' is a leaf stage; a leaf stage reads no other stage. Take it out of"),
    ],
)
def test_wrong_needs_name_the_field_what_is_there_and_what_is_accepted(
    config: StageConfig, field: str, problem: str
) -> None:
    with pytest.raises(FieldError) as refused:
        graph_of(x=config)
    assert ".".join(refused.value.field) == f"stages.x.{field}"
    assert refused.value.problem.startswith(problem)

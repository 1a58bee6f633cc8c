from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import Field

from base.config import ADDED_LATER, NOT_IN_FINGERPRINT, StrictConfig
from pipelines.engine.fingerprint import InputIdentity, differences, fingerprint_stage
from pipelines.engine.stage import Content, Resources, StageConfig


class Model(StrictConfig):
    width: int = 8
    rate: float = 0.1
    log_every: int = Field(10, json_schema_extra=NOT_IN_FINGERPRINT)


class Config(StageConfig):
    kind: str = "train"
    model: Model = Model()
    layers: tuple[Model, ...] = ()
    by_name: dict[str, Model] = Field(default_factory=dict)
    password: str = ""


def identity(name: str, fingerprint: str, kind: str = "tokenize") -> InputIdentity:
    return InputIdentity(name=name, kind=kind, fingerprint=fingerprint)


def fingerprint(
    config: Config | None = None, *inputs: InputIdentity, version: int = 1, content: Content | None = None
) -> Any:
    stage: Any = SimpleNamespace(kind="train", code_version=version)
    by_kind = {one.kind: [other for other in inputs if other.kind == one.kind] for one in inputs}
    return fingerprint_stage(stage, config or Config(), by_kind, content)


def test_what_changes_the_result_changes_the_fingerprint() -> None:
    different = [
        fingerprint(),
        fingerprint(Config(model=Model(width=9))),
        fingerprint(Config(layers=(Model(),))),
        fingerprint(Config(layers=(Model(width=9),))),
        fingerprint(Config(by_name={"a": Model()})),
        fingerprint(version=2),
        fingerprint(content="x"),
        fingerprint(None, identity("a", "1")),
        fingerprint(None, identity("a", "1"), identity("b", "2")),
        fingerprint(None, identity("b", "2"), identity("a", "1")),
        fingerprint(None, identity("a", "1", kind="train")),
    ]
    assert len({item.digest for item in different}) == len(different)


@pytest.mark.parametrize(
    "config",
    [
        Config(resources=Resources(num_workers=7)),
        Config(needs=("x",)),
        Config(model=Model(log_every=1)),
    ],
)
def test_what_cannot_change_the_result_does_not(config: Config) -> None:
    assert fingerprint(config).digest == fingerprint().digest


def test_marked_fields_are_left_out_at_any_depth() -> None:
    deep = [Config(layers=(Model(log_every=n),), by_name={"a": Model(log_every=n)}) for n in (1, 2)]
    assert fingerprint(deep[0]).digest == fingerprint(deep[1]).digest


def test_renaming_an_input_does_not_matter() -> None:
    assert fingerprint(None, identity("old", "1")).digest == fingerprint(None, identity("new", "1")).digest


def test_the_fingerprint_of_a_known_config_stays_as_it_is() -> None:
    assert fingerprint().digest == "e3d0082e3c2e62114305a22c1152c8f7ad5ff2245294f20d1d1d746e27849d70"


def test_differences_name_the_field_with_old_and_new_value() -> None:
    old = fingerprint(Config(model=Model(rate=0.1)), identity("tokens", "a" * 64)).parts
    new = fingerprint(Config(model=Model(rate=0.2)), identity("tokens", "b" * 64), version=2, content="c").parts
    assert differences(old, new) == [
        "code version of train: 1 -> 2",
        "model.rate: 0.1 -> 0.2",
        "the content of the raw input",
        "input tokens: aaaaaaaa -> bbbbbbbb",
    ]
    assert differences(old, old) == []


def test_differences_name_what_has_a_digest_of_its_own() -> None:
    old = fingerprint(content={"source of a": "1", "source of b": "2", "source of c": "3"})
    new = fingerprint(content={"source of a": "1", "source of b": "9", "source of d": "4"})
    assert differences(old.parts, new.parts) == ["source of b", "source of d: new", "source of c: gone"]
    assert old.digest != new.digest


def test_differences_tell_of_inputs_that_come_go_and_swap() -> None:
    a, b = identity("a", "1"), identity("b", "2")
    assert differences(fingerprint(None, a).parts, fingerprint(None, a, b).parts) == ["input b: new"]
    assert differences(fingerprint(None, a, b).parts, fingerprint(None, a).parts) == ["input b: gone"]
    assert differences(fingerprint(None, a, b).parts, fingerprint(None, b, a).parts) == ["the order of the inputs"]
    assert differences(fingerprint(None, a).parts, fingerprint(None, identity("renamed", "1")).parts) == []


def test_parts_hold_no_secrets() -> None:
    secret = fingerprint(Config(password="hunter22"))
    assert secret.parts.config["password"] == "***"
    assert secret.digest != fingerprint(Config(password="other")).digest


def test_precision_counts_as_it_will_be_used() -> None:
    from pipelines.stages.train.config import TrainStageConfig
    from pipelines.stages.train.stage import TrainStage

    def digest(precision: str, gpus: int) -> str:
        config = TrainStageConfig.model_validate(
            {
                "kind": "train",
                "model": {"pattern": "bmojo", "d_model": 32, "num_heads": 2, "ssm_head_dim": 16, "d_state": 16,
                          "window_size": 16, "chunk_size": 8, "num_eidetic": 4},
                "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 3, "warmup_steps": 0,
                "precision": precision, "resources": {"gpus_per_worker": gpus},
            }
        )  # fmt: skip
        return fingerprint_stage(TrainStage(), config, {}, None).digest

    assert digest("auto", 0) != digest("auto", 1)
    assert digest("auto", 0) == digest("fp32", 0) == digest("fp32", 1)
    assert digest("auto", 1) == digest("bf16", 1) == digest("bf16", 0)


def test_a_field_added_later_counts_once_it_is_set() -> None:
    class Later(Model):
        shape: str = Field("round", json_schema_extra=ADDED_LATER)
        sides: tuple[int, ...] = Field(default_factory=tuple, json_schema_extra=ADDED_LATER)

    class NewConfig(Config):
        model: Model = Later()

    before = fingerprint(Config())
    assert fingerprint(NewConfig()).digest == before.digest
    assert fingerprint(NewConfig(model=Later(shape="round"))).digest == before.digest
    square = fingerprint(NewConfig(model=Later(shape="square")))
    assert len({before.digest, square.digest, fingerprint(NewConfig(model=Later(sides=(1,)))).digest}) == 3
    assert differences(before.parts, square.parts) == ['model.shape: (not there) -> "square"']

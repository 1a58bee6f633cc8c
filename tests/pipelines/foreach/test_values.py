"""Names of values, and values laid over the settings of a stage."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import is_stage_name
from pipelines.foreach.values import ForeachField, Placed, Value, name_of, place, read_foreach, replaces, written_as


def placed(path: str, value: Any, key: str | int = 0) -> Placed:
    found = Value("name", key, value)
    return ForeachField("train", path, (found,)).placed(found)[0]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, "0"),
        (12_000, "12000"),
        (1.0, "1"),
        (0.95, "0_95"),
        (1e-3, "1e-3"),
        (2.5e-4, "2_5e-4"),
        (0.0025, "0_0025"),
        (1e6, "1e6"),
        (-0.5, "-0_5"),
        (True, "true"),
        (None, "null"),
        ("bmojo-130m", "bmojo-130m"),
        ("swa-1.4b", "swa-1_4b"),
        ("3e-4", "3e-4"),
        ([0.9, 0.95], "0_9-0_95"),
        ("bmojo*4", None),
        ("", None),
        ("é", None),
        ([], None),
        ([[1], [2]], None),
        (["a b"], None),
        ({"pattern": "swa"}, None),
    ],
)
def test_a_value_has_a_readable_name_or_none(value: Any, name: str | None) -> None:
    assert name_of(value) == name


@given(st.floats(allow_nan=False))
def test_the_name_of_a_number_gives_the_number_back(number: float) -> None:
    name = name_of(number)
    assert name is not None
    assert float(name.replace("_", ".")) == number
    assert is_stage_name(f"x{name}") or len(name) > 38


def test_a_mapping_is_laid_over_a_mapping() -> None:
    settings = {"model": {"d_model": 192, "d_ff": 512}, "lr": 1e-3}
    assert place(settings, [placed("model", {"d_ff": 768})]) == {"model": {"d_model": 192, "d_ff": 768}, "lr": 1e-3}
    assert settings["model"] == {"d_model": 192, "d_ff": 512}, "other copies are made of it"


@pytest.mark.parametrize(
    ("own", "value", "expected"),
    [
        ({"num_eidetic": 0}, "swa-130m", {"num_eidetic": 0, "preset": "swa-130m"}),
        ("bmojo-130m", {"num_eidetic": 0}, {"preset": "bmojo-130m", "num_eidetic": 0}),
        ("bmojo-130m", "swa-130m", {"preset": "swa-130m"}),
        ({"num_eidetic": 0}, {"preset": "swa-130m", "d_ff": 8}, {"num_eidetic": 0, "preset": "swa-130m", "d_ff": 8}),
        (None, "swa-130m", "swa-130m"),
        (None, {"pattern": "swa"}, {"pattern": "swa"}),
    ],
)
def test_a_preset_is_a_mapping_with_that_preset(own: Any, value: Any, expected: Any) -> None:
    settings = {} if own is None else {"model": own}
    assert place(settings, [placed("model", value)]) == {"model": expected}


@pytest.mark.parametrize(
    ("own", "value"),
    [
        ({"kind": "wsd", "decay_fraction": 0.2}, {"kind": "cosine"}),  # a field of the other kind would mean nothing
        ([0.9, 0.95], [0.8, 0.9]),
        (1e-3, 1e-4),
        ({"a": 1}, None),
    ],
)
def test_anything_else_is_replaced(own: Any, value: Any) -> None:
    assert place({"field": own}, [placed("field", value)]) == {"field": value}


def test_a_deeper_field_has_the_last_word() -> None:
    fields = [placed("model", {"preset": "swa-130m", "window_size": 64}), placed("model.window_size", 128)]
    assert place({}, fields) == {"model": {"preset": "swa-130m", "window_size": 128}}
    assert place({"model": "swa-130m"}, fields[1:]) == {"model": {"preset": "swa-130m", "window_size": 128}}


def test_copies_share_nothing_that_could_be_changed() -> None:
    value = {"offload": {"optimizer": True}}
    one = place({}, [placed("backend", value), placed("backend.offload.optimizer", False)])
    assert one == {"backend": {"offload": {"optimizer": False}}}
    assert value == {"offload": {"optimizer": True}}


SETTINGS = {"model": {"d_model": 192}, "lr": 1e-3}


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ((), ()),
        (("lr",), ("lr",)),
        (("seed",), ("foreach", "seed", "4")),
        (("model",), ("foreach", "model", "swa")),
        (("model", "d_ff"), ("foreach", "model", "swa", "d_ff")),
        (("model", "d_model"), ("model", "d_model")),
        (("model", "window_size"), ("foreach", "model.window_size", "small")),
        (("model", "chunk_size"), ("foreach", "model", "swa", "chunk_size")),  # of the preset, perhaps
        (("resources",), ("foreach", "resources.num_workers")),
        (("resources", "num_workers"), ("foreach", "resources.num_workers", "1")),
        (("betas", 1), ("betas", "1")),
    ],
)
def test_a_setting_is_found_where_it_is_written(path: tuple[str | int, ...], written: tuple[str, ...]) -> None:
    fields = [
        placed("model.window_size", 64, "small"),
        placed("resources.num_workers", 2, 1),
        placed("model", {"d_ff": 768}, "swa"),
        placed("seed", 0, 4),
    ]
    assert written_as(SETTINGS, fields, path) == written


@pytest.mark.parametrize(
    ("settings", "value", "path", "is_replaced"),
    [
        ({"lr": 1}, placed("lr", 2), ("lr",), True),
        ({"lr": 1}, placed("seed", 2), ("lr",), False),
        ({"model": {"d_ff": 1}}, placed("model", {"pattern": "swa"}), ("model", "d_ff"), False),
        ({"model": {"d_ff": 1}}, placed("model", {"d_ff": 2}), ("model", "d_ff"), True),
        ({"model": {"d_ff": 1}}, placed("model", "swa-130m"), ("model",), False),
        ({"model": {"preset": "x"}}, placed("model", "swa-130m"), ("model",), True),
        ({"model": {}}, placed("model", "swa-130m"), ("model",), False),  # fields of the file are taken out so
        ({"model": {"d_ff": 1}}, placed("model.d_ff", 2), ("model",), False),
        ({"schedule": {"kind": "wsd"}}, placed("schedule", {"kind": "cosine"}), ("schedule", "decay_fraction"), True),
    ],
)
def test_a_setting_of_which_nothing_is_left(
    settings: dict[str, Any], value: Placed, path: tuple[str, ...], is_replaced: bool
) -> None:
    assert replaces(settings, value, path) is is_replaced


def test_a_variant_sets_several_fields() -> None:
    """Each as if it were a field of `foreach`: laid over the stage's own, and found where it is written."""
    (field,) = read_foreach("train", {"variant": {"as_it_is": {}, "fast": {"lr": 1e-2, "model": {"d_ff": 768}}}})
    plain, fast = (field.placed(value) for value in field.values)
    assert place(SETTINGS, plain) == SETTINGS
    assert place(SETTINGS, fast) == {"model": {"d_model": 192, "d_ff": 768}, "lr": 1e-2}
    assert written_as(SETTINGS, fast, ("lr",)) == ("foreach", "variant", "fast", "lr")
    assert written_as(SETTINGS, fast, ("model", "d_ff")) == ("foreach", "variant", "fast", "model", "d_ff")
    assert written_as(SETTINGS, fast, ("model", "d_model")) == ("model", "d_model")


def test_fields_and_values_keep_their_order() -> None:
    fields = read_foreach("train", {"seed": [2, 0], "model": {"b": {}, "a": {}}})
    assert [(field.path, [value.name for value in field.values]) for field in fields] == [
        ("seed", ["2", "0"]),
        ("model", ["b", "a"]),
    ]

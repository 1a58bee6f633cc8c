"""The config's patterns, checks and errors."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bmojo import BMojoLM, ModelConfig
from bmojo.pattern import expand_pattern
from tests.bmojo.model_family import small_config


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("bmojo", ("bmojo",)),
        ("bmojo*3", ("bmojo",) * 3),
        ("(mamba2,swa)*2", ("mamba2", "swa") * 2),
        (" ( mamba*2 , attention ) * 2 , swa ", ("mamba", "mamba", "attention") * 2 + ("swa",)),
        ("((mamba2,swa)*2,bmojo_f)*2", (("mamba2", "swa") * 2 + ("bmojo_f",)) * 2),
    ],
)
def test_patterns_expand(pattern, layers):
    assert expand_pattern(pattern) == layers


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "ends where a mixer name is expected"),
        ("bmojo*", "needs a repeat count"),
        ("bmojo*0", "needs a repeat count of 1 or more"),
        ("(bmojo", "is not closed"),
        ("bmojo)", "unexpected"),
        ("bmojo,,swa", "unexpected"),
        ("bmojo swa", "unexpected 'swa'"),
        ("bmojo+swa", r"unexpected character '\+'"),
        ("bmoja", "unknown mixer 'bmoja'; the mixers are attention, swa, mamba"),
        ("bmojo*100000", "more than 1024 layers"),
        ("((bmojo*512)*512)*512", "more than 1024 layers"),
    ],
)
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(pattern=pattern)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windw_size": 4}, "windw_size"),
        ({"d_model": 30}, "not a multiple of num_heads"),
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads"),
        ({"head_dim": 5}, "is odd"),
        ({"chunk_size": 7}, "chunk_size=7 exceeds window_size=6"),
        ({"ssm_head_dim": 12}, "not a multiple of ssm_head_dim"),
        ({"ssm_num_groups": 3}, "not a multiple of ssm_num_groups|multiple of"),
        ({"dt_min": 0.5}, "dt_min must be below dt_max"),
        ({"pattern": "bmojo*"}, "repeat count"),
    ],
)
def test_bad_fields_are_refused_with_the_field_named(fields, message):
    with pytest.raises(ValidationError, match=message):
        small_config(**fields)


def test_fields_that_the_pattern_does_not_use_are_not_checked():
    ModelConfig(pattern="swa*2", ssm_head_dim=7, chunk_size=4096)


def test_vocab_size_comes_from_the_tokenizer_once():
    config = ModelConfig()
    assert config.with_vocab_size(100).vocab_size == 100
    with pytest.raises(ValueError, match=r"model.vocab_size is 100 but the tokenizer has 101"):
        config.with_vocab_size(100).with_vocab_size(101)
    with pytest.raises(ValueError, match="vocab_size is not set"):
        BMojoLM(config)


def test_config_survives_json():
    config = small_config(pattern="(mamba2,bmojo)*2", innovation_tau=5.0)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config

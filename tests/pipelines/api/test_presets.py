"""`bmojo models`: the presets side by side."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from base.errors import UserError
from bmojo.config import ModelConfig
from bmojo.counting import count
from pipelines.api.presets import list_presets
from pipelines.cli.app import app
from pipelines.loading import model_presets, read_preset


def test_every_preset_has_a_row_of_its_counts() -> None:
    rows = list_presets(seq_len=512, vocab_size=1000)
    assert [row.preset for row in rows] == model_presets()
    for row in rows:
        counts = count(ModelConfig(**read_preset(row.preset), vocab_size=1000), 512)
        assert (row.num_params, row.state_bytes) == (counts.num_params, counts.state_bytes)


def test_longer_texts_take_more_state_of_full_attention_alone() -> None:
    names = ("attention-130m", "mamba2-130m")
    short, long = (list_presets(names, seq_len) for seq_len in (1024, 2048))
    assert [after.state_bytes / before.state_bytes for before, after in zip(short, long, strict=True)] == [2, 1]


def test_the_command_prints_the_rows_that_are_asked_for() -> None:
    runner = CliRunner()
    assert "9.70 MB" in runner.invoke(app, ["models", "mamba2-130m"]).output
    printed = json.loads(runner.invoke(app, ["models", "mamba2-130m", "--json"]).stdout)
    assert printed == [row.model_dump() for row in list_presets(["mamba2-130m"])]


def test_a_misspelt_preset_is_answered_with_a_near_one() -> None:
    with pytest.raises(UserError, match=r"no model preset 'mamba-130m'.*mamba2-130m"):
        list_presets(["mamba-130m"])

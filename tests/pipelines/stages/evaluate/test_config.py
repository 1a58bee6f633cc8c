"""What the settings amount to on the CPU and on a GPU, and what of it is part of the fingerprint."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.engine.fingerprint import config_that_matters
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.measures import DEFAULT, MEASURES

GPU = {"gpus_per_worker": 1}


def config(**fields: Any) -> EvaluateStageConfig:
    return EvaluateStageConfig.model_validate({"kind": "evaluate", **fields})


def hashed(**fields: Any) -> dict[str, Any]:
    made = config(**fields)
    return config_that_matters(made) | made.settled()


def test_what_is_measured_is_part_of_the_fingerprint() -> None:
    assert hashed() == {
        "kind": "evaluate",
        "measures": [
            {"kind": "text", "name": None, "max_tokens": None, "baselines": True},
            {"kind": "position", "name": None, "multiple": 4, "max_windows": 16, "packed": False},
            {"kind": "samples", "name": None, "prompts": [""], "max_new_tokens": 200, "temperature": 0.8, "top_k": 50,
             "top_p": None, "seed": 0},
        ],
        "model": None,
        "step": None,
        "batch_size": 8,
        "precision": "fp32",
    }  # fmt: skip
    assert hashed() == hashed(precision="fp32") == hashed(batch_size=8) == hashed(resources={"num_workers": 3})
    assert hashed(step=5) != hashed()


def test_precision_and_the_cut_of_the_work_are_part_of_the_fingerprint() -> None:
    assert hashed(precision="bf16") == hashed() | {"precision": "bf16"}
    assert hashed(resources=GPU) == hashed() | {"precision": "bf16", "batch_size": "65536 tokens"}
    assert hashed(resources=GPU, precision="fp32", batch_size=4) == hashed() | {"precision": "fp32", "batch_size": 4}


def test_a_gpu_is_filled_by_tokens_and_the_cpu_by_rows() -> None:
    def rows(seq_len: int, **fields: Any) -> tuple[int, int]:
        return config(**fields).rows(seq_len), config(**fields).long_rows(4 * seq_len)

    assert rows(512) == (8, 1)
    assert rows(512, resources=GPU) == (128, 32)
    assert rows(1 << 20, resources=GPU, batch_size=4) == (4, 1)
    assert rows(1 << 20, resources=GPU) == (1, 1)


def test_two_measures_of_a_kind_need_names() -> None:
    both = [{"kind": "position"}, {"kind": "position", "multiple": 8}]
    with pytest.raises(ValidationError, match="two measures are called 'position'"):
        config(measures=both)
    both[1] |= {"name": "far"}
    assert [measure.called for measure in config(measures=both).measures] == ["position", "far"]
    with pytest.raises(ValidationError):
        config(measures=[{"kind": "text", "name": "a/b"}])


def test_what_is_measured_if_nothing_is_said() -> None:
    kinds = [measure.kind for measure in MEASURES]
    assert [measure.kind for measure in DEFAULT] == ["text", "position", "samples"]
    assert len(set(kinds)) == len(kinds)
    for measure in MEASURES:
        assert measure.config_type().kind == measure.kind  # a measure's settings all have defaults

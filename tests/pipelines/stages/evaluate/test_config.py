"""What the settings amount to on the CPU and on a GPU, and what of it is part of the fingerprint."""

from __future__ import annotations

from typing import Any

from pipelines.engine.fingerprint import config_that_matters
from pipelines.stages.evaluate.config import EvaluateStageConfig

GPU = {"gpus_per_worker": 1}


def config(**fields: Any) -> EvaluateStageConfig:
    return EvaluateStageConfig.model_validate({"kind": "evaluate", **fields})


def hashed(**fields: Any) -> dict[str, Any]:
    made = config(**fields)
    return config_that_matters(made) | made.settled()


def test_evaluations_in_float32_on_the_cpu_keep_their_fingerprint() -> None:
    assert hashed() == {
        "kind": "evaluate",
        "max_tokens": None,
        "batch_size": 8,
        "context_multiple": 4,
        "context_windows": 16,
        "baselines": True,
        "sample": {
            "prompts": [""], "max_new_tokens": 200, "temperature": 0.8, "top_k": 50, "top_p": None, "seed": 0,
        },
    }  # fmt: skip
    assert hashed() == hashed(precision="fp32") == hashed(batch_size=8) == hashed(resources={"num_workers": 3})


def test_precision_and_the_cut_of_the_work_are_part_of_the_fingerprint() -> None:
    assert hashed(precision="bf16") == hashed() | {"precision": "bf16"}
    assert hashed(resources=GPU) == hashed() | {"precision": "bf16", "batch_size": "65536 tokens"}
    assert hashed(resources=GPU, precision="fp32", batch_size=4) == hashed() | {"precision": "fp32", "batch_size": 4}


def test_a_gpu_is_filled_by_tokens_and_the_cpu_by_rows() -> None:
    sample = {"prompts": ["a", "b", "c"]}
    assert config(sample=sample).pieces(seq_len=512, window_tokens=2048) == (8, 4, 1, 1)
    assert config(sample=sample, resources=GPU).pieces(seq_len=512, window_tokens=2048) == (128, 4, 32, 3)
    assert config(resources=GPU, batch_size=4).pieces(seq_len=1 << 20, window_tokens=1 << 22) == (4, 4, 1, 1)
    assert config(resources=GPU).pieces(seq_len=1 << 20, window_tokens=1 << 22).batch_size == 1

"""Cross-field checks of the train stage's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from base.config import NOT_IN_FINGERPRINT
from pipelines.engine.fingerprint import config_that_matters
from pipelines.errors import ConfigError
from pipelines.stages.train.config import TrainStageConfig, check_seq_len

MakeConfig = Callable[..., TrainStageConfig]


def test_a_batch_that_workers_do_not_divide_names_the_numbers_that_do(train_config: MakeConfig) -> None:
    with pytest.raises(ValidationError, match="not a multiple of") as caught:
        train_config(global_batch_size=12, resources={"num_workers": 5})
    assert "Set resources.num_workers to 4 (these divide it: 1, 2, 3, 4, 6, 12)" in str(caught.value)


@pytest.mark.parametrize(("num_workers", "micro_batch_size"), [(1, 4), (2, 5), (3, 4), (4, 5), (5, 4), (6, 5), (60, 1)])
def test_a_worker_takes_the_largest_divisor_of_its_share_up_to_micro_batch_size(
    train_config: MakeConfig, num_workers: int, micro_batch_size: int
) -> None:
    most = 5 if micro_batch_size == 5 else 4
    config = train_config(global_batch_size=60, micro_batch_size=most, resources={"num_workers": num_workers})
    assert config.worker_micro_batch_size == micro_batch_size
    assert config.accumulation_steps * config.worker_micro_batch_size * num_workers == 60


def test_the_sizes_of_an_elastic_group_divide_the_batch(train_config: MakeConfig) -> None:
    config = train_config(global_batch_size=12, resources={"num_workers": 6, "min_workers": 2})
    assert config.group_sizes == [2, 3, 4, 6]
    assert config.with_workers(3).worker_batch_size == 4
    assert train_config(resources={"num_workers": 4}).group_sizes == [4]


def test_more_workers_at_least_than_at_most_are_refused(train_config: MakeConfig) -> None:
    with pytest.raises(ValidationError, match="min_workers=4 is more than num_workers=2"):
        train_config(resources={"num_workers": 2, "min_workers": 4})


@pytest.mark.parametrize(("limits", "found"), [({}, "neither"), ({"max_steps": 10, "max_tokens": 1000}, "both")])
def test_exactly_one_of_steps_and_tokens(tiny_model: dict[str, Any], limits: dict[str, int], found: str) -> None:
    fields = {"kind": "train", "model": tiny_model, "global_batch_size": 2, "micro_batch_size": 1, "warmup_steps": 1}
    with pytest.raises(ValidationError, match=f"found {found} of max_steps and max_tokens"):
        TrainStageConfig.model_validate(fields | limits)


def test_warm_up_must_end_before_training_does(train_config: MakeConfig) -> None:
    with pytest.raises(ValidationError, match="set warmup_steps to 1 or less"):
        train_config(max_steps=12, warmup_steps=12)


def test_tokens_are_rounded_up_to_whole_steps(train_config: MakeConfig) -> None:
    assert train_config(max_tokens=8 * 64 * 3 + 1).num_steps(seq_len=64) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": {"kind": "deepspeed", "offload": {}}}, "gpus_per_worker is 0"),
        ({"backend": {"kind": "deepspeed", "offload": {}, "zero_stage": 0}}, "needs zero_stage 1, 2 or 3"),
        ({"backend": {"kind": "deepspeed", "offload": {"parameters": True}}}, "needs zero_stage 3"),
        ({"zero_stage": 1}, "Extra inputs"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"precision": "float8"}, "precision: float8 is for GPUs, and resources.gpus_per_worker is 0"),
        ({"learning_rate": 1e-3}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(train_config: MakeConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train_config(**changes)


def test_precision_auto_follows_the_device(train_config: MakeConfig) -> None:
    assert not train_config().autocast_bf16
    assert train_config(resources={"gpus_per_worker": 1}).autocast_bf16
    assert not train_config(resources={"gpus_per_worker": 1}, precision="fp32").autocast_bf16


def test_float8_is_bfloat16_with_projections_in_float8_and_another_result(train_config: MakeConfig) -> None:
    bf16, float8 = (train_config(resources={"gpus_per_worker": 1}, precision=name) for name in ("bf16", "float8"))
    assert float8.autocast_bf16
    assert (bf16.trains_in_float8, float8.trains_in_float8) == (False, True)
    assert (bf16.settled()["precision"], float8.settled()["precision"]) == ("bf16", "float8")


def test_sequence_of_broken_chunks_is_refused_with_lengths_that_would_do(train_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"seq_len=100 .*chunk_size=16.*Set seq_len to 96 or 112"):
        check_seq_len(train_config(), 100, "train", "tokens")
    check_seq_len(train_config(), 96, "train", "tokens")


def test_layers_without_chunks_take_any_length(train_config: MakeConfig, tiny_model: dict[str, Any]) -> None:
    config = train_config(model=tiny_model | {"pattern": "swa*2"})
    check_seq_len(config, 100, "train", "tokens")


def test_warm_up_is_checked_against_tokens_when_the_length_is_known(train_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="max_tokens=1000 is 2 steps"):
        check_seq_len(train_config(max_tokens=1000, warmup_steps=5), 64, "train", "tokens")


def test_every_field_is_described_and_only_harmless_ones_stay_out_of_the_fingerprint() -> None:
    fields = TrainStageConfig.model_fields
    assert all(field.description for name, field in fields.items() if name != "kind")
    outside = {name for name, field in fields.items() if field.json_schema_extra == NOT_IN_FINGERPRINT}
    assert outside == {
        "needs", "resources", "validate_every_steps", "log_every_steps", "checkpoint_every_steps", "checkpoint_every_s",
        "keep_checkpoints", "keep_every_steps",
        "collective_timeout_s", "grow_after_s", "hang_after_s", "cuda_graphs",
        "retries", "lost_retries", "backoff_s", "timeout_s", "on_failure",
        "activation_checkpointing",
        "micro_batch_size",
        "profile", "log_norms_every_steps", "check_replicas_every_steps", "check_documents_every_steps",
        "backend", "spikes",  # these two count in forms of their own: the next tests
    }  # fmt: skip


def test_what_changes_rounding_only_starts_no_stage_anew(train_config: MakeConfig) -> None:
    def hashed(**changes: Any) -> dict[str, Any]:
        config = train_config(resources={"gpus_per_worker": 1, "num_workers": changes.pop("num_workers", 1)}, **changes)
        return config_that_matters(config) | config.settled()

    sharded = {"kind": "deepspeed", "zero_stage": 3, "offload": {"optimizer": True, "parameters": True}}
    assert hashed(backend=sharded, micro_batch_size=1, num_workers=4) == hashed()
    assert hashed(global_batch_size=16) != hashed()


def test_a_hang_must_be_reported_before_the_workers_give_one_another_up(train_config: MakeConfig) -> None:
    assert train_config().hang_limit_s == 300
    assert train_config(collective_timeout_s=30).hang_limit_s == 15
    with pytest.raises(ValidationError, match="hang_after_s=600 is not less than collective_timeout_s=600"):
        train_config(hang_after_s=600)

"""Runs with a finished training and evaluation, their records written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.engine.events import Ended, Finished, Status
from pipelines.engine.fingerprint import FingerprintParts, digest_json
from pipelines.engine.records import StageRecord, write_record
from pipelines.engine.runs import Run
from pipelines.engine.stage import StageOutput
from pipelines.loading import validate_pipeline
from pipelines.stages.evaluate.results import Figure, MeasureResult
from pipelines.stages.evaluate.stage import Evaluated, EvaluateOutput
from pipelines.stages.tokenize.stage import TokenizeOutput
from pipelines.stages.tokenizer.stage import TokenizerOutput
from pipelines.stages.train.stage import HISTORY, TrainOutput
from pipelines.stages.uncertainty import Ratio, interval
from pipelines.storage import Storage
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.made_runs import made_run
from tests.pipelines.stages.report.made_up import write_units

TOKENIZER = TokenizerOutput(vocab_size=320, eod_id=0, end_of_document="<|end|>", backend="tiktoken", sha256="0")
TOKENS = TokenizeOutput(
    seq_len=64, vocab_size=320, eod_id=0, token_dtype="uint16", tokenizer_sha256="0", has_loss_mask=False, num_slices=1,
    num_train_documents=300, num_train_samples=200, num_train_tokens=12_000, num_train_bytes=48_000,
    num_train_cut_documents=5, num_train_padded_tokens=128, num_valid_documents=31, num_valid_samples=20,
    num_valid_tokens=1_200, num_valid_bytes=4_800, num_valid_cut_documents=1, num_valid_padded_tokens=0,
    left_out={"empty": 3, "near_duplicate": 6}, num_duplicate_files=2, train_sha256="a", valid_sha256="b",
)  # fmt: skip
HISTORY_POINTS = {
    "train/loss": [(1, 5.0), (2, 4.0)],
    "train/tokens": [(1, 100), (2, 200)],
    "train/tokens_per_s": [(1, 50.0), (2, 100.0)],
}


def train_output(**changes: Any) -> TrainOutput:
    facts: dict[str, Any] = {
        "model": "model", "history": HISTORY, "tokenizer": "tokenizer", "seq_len": 64, "vocab_size": 320,
        "num_params": 4_200_000, "steps": 2, "tokens_seen": 200, "final_train_loss": 4.0, "initial_valid_loss": 6.0,
        "final_valid_loss": 4.1, "train_time_s": 3.0, "tokens_per_s": 66.7, "mfu": 0.41, "peak_flops": 1.2e11,
        "devices": "2 x CPU", **changes,
    }  # fmt: skip
    return TrainOutput(**facts)


def evaluate_output(artifact: ArtifactDir, loss: float, split: str) -> EvaluateOutput:
    """Args: loss: of all documents together. split: what the documents are."""
    tokens = np.array([100.0, 300, 50, 1000, 250, 80, 420, 700])
    hardness = np.array([0.5, -0.2, 0.9, 0.1, -0.4, 0.3, -0.1, 0.2])
    nats = tokens * (loss + hardness - (tokens * hardness).sum() / tokens.sum())
    estimate = interval(Ratio(nats, tokens))
    figure = Figure(
        name="loss", value=estimate.value, low=estimate.low, high=estimate.high, unit="nats per token", is_main=True
    )
    result = MeasureResult(
        name="text", kind="text", unit="document", num_units=len(tokens), figures=(figure,),
        units=write_units(artifact, "text", split, loss=(nats, tokens)),
    )  # fmt: skip
    return EvaluateOutput(
        evaluated=Evaluated(stage="train", step=2, model="model"), precision="fp32", results=(result,)
    )


def pipeline_config(storage: Storage, name: str, lr: float = 1e-3, seed: int = 0) -> dict[str, Any]:
    source = {"kind": "python_stdlib"}
    stages = {
        "tokenizer": {"kind": "tokenizer", "source": source, "vocab_size": 320},
        "tokens": {"kind": "tokenize", "needs": ["tokenizer"], "source": source, "seq_len": 64,
                   "validation_fraction": 0.1},
        "train": {"kind": "train", "needs": ["tokens"], "lr": lr, "seed": seed, "max_steps": 2,
                  "warmup_steps": 0, "global_batch_size": 4, "micro_batch_size": 4,
                  "model": {"pattern": "bmojo*2", "d_model": 32, "num_heads": 2, "ssm_head_dim": 16, "d_state": 16,
                            "window_size": 16, "chunk_size": 8, "num_eidetic": 4}},
        "evaluate": {"kind": "evaluate", "needs": ["train", "tokens"]},
    }  # fmt: skip
    config = {"name": name, "storage": storage.url, "stages": stages}
    return validate_pipeline(config, "made").model_dump(mode="json")


def evaluated_run(
    storage: Storage,
    run_id: str,
    loss: float,
    split: str = "split",
    finished: bool = True,
    overrides: tuple[str, ...] = (),
    **changes: Any,
) -> Run:
    """A run of the stages above. Args: finished: whether its evaluation is; changes: to its training."""
    name = run_id.rpartition("-")[0]
    config = pipeline_config(storage, name, **changes)
    kinds = {stage: fields["kind"] for stage, fields in config["stages"].items()}
    fingerprints = {stage: digest_json([config["stages"][stage], _varied(stage, loss, changes)]) for stage in kinds}
    artifacts = {
        stage: ArtifactDir(storage, f"artifacts/{kind}/{stage}-{fingerprints[stage][:8]}")
        for stage, kind in kinds.items()
    }
    outputs: dict[str, StageOutput] = {
        "tokenizer": TOKENIZER, "tokens": TOKENS, "train": train_output(),
        "evaluate": evaluate_output(artifacts["evaluate"], loss, split),
    }  # fmt: skip
    run = made_run(
        storage, run_id, config, kinds, fingerprints, config_path="made.yaml", overrides=overrides,
        hardware={"cpu": "a CPU"}, git_commit="c" * 40 + "-dirty",
    )  # fmt: skip
    log = run.log(2)
    for stage, output in outputs.items():
        if stage == "evaluate" and not finished:
            continue
        artifact = artifacts[stage]
        if stage == "train":
            artifact.write_json(HISTORY, HISTORY_POINTS)
        made_record(artifact, stage, kinds[stage], fingerprints[stage], config["stages"][stage], output)
        log.append(Finished(stage=stage, artifact=artifact.relpath))
    log.append(Ended(status=Status.SUCCEEDED if finished else Status.FAILED))
    return run


def _varied(stage: str, *changes: Any) -> Any:
    """What the results of a stage depend on beside its settings."""
    return list(changes) if stage == "evaluate" else None


def made_record(
    artifact: ArtifactDir, name: str, kind: str, fingerprint: str, config: dict[str, Any], output: StageOutput
) -> None:
    """The record of a finished stage, in its artifact."""
    record = StageRecord(
        kind=kind, name=name, fingerprint=fingerprint, config=config, inputs={},
        parts=FingerprintParts(kind=kind, code_version=1, config={}, inputs=(), content=None),
        output=output.model_dump(mode="json"), files=artifact.describe_files(),
        created_at="2026-01-02T03:04:05.000+00:00", duration_s=75.0, versions={"torch": "2.9"}, git_commit="c" * 40,
        hardware={"cpu": "a CPU", "gpus": "none"},
    )  # fmt: skip
    if not artifact.exists("record.json"):  # as of a stage that another run made
        write_record(artifact, record)

"""Associative recall beyond the window: which models of the family can look up what they read long ago.

Trains each model on multi-query associative recall (data/tasks/mqar.py) with the same batches, steps and optimizer, and
writes one JSON file per run under --out; existing runs are not repeated, so an interrupted benchmark resumes.
The report (Markdown and a plot) is written from whatever runs are there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count as count_from_zero
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import _recall_report as recall_report
from bmojo import BMojoLM, ModelConfig
from bmojo.counting import count
from bmojo.mixers import MIXERS
from bmojo.mixers import bmojo as bmojo_mixer
from bmojo.mixers.base import LayerMemory
from data.tasks.mqar import RecallConfig
from data.tasks.recall_batches import RecallBatch, recall_batch, recall_batches
from kernels.innovation_select import innovation_select

MODELS: dict[str, dict[str, Any]] = {
    **{name: {"pattern": f"{name}*2"} for name in MIXERS},
    "bmojo_random": {"pattern": "bmojo*2", "selection": "random"},
}
TEST_SEED = 1_000_003


@dataclass(frozen=True)
class Settings:
    """What every run shares; runs of other settings are not mixed. Lengths and distances in tokens."""

    seq_len: int = 64
    num_pairs: int = 8
    num_queries: int = 8
    min_distance: int = 32
    vocab_size: int = 64
    noise: bool = True
    d_model: int = 64
    num_heads: int = 2
    d_state: int = 64
    d_ff: int = 0
    init_std: float = 0.1  # about 1 / sqrt(d_model); the default 0.02 is for wider models, see the report
    window_size: int = 8
    num_eidetic: int = 16
    steps: int = 1000
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    eval_every: int = 50
    num_test: int = 512

    @property
    def task(self) -> RecallConfig:
        return RecallConfig(
            vocab_size=self.vocab_size, num_pairs=self.num_pairs, seq_len=self.seq_len, num_queries=self.num_queries,
            min_distance=self.min_distance, noise=self.noise,
        )  # fmt: skip

    def model(self, name: str) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size, d_model=self.d_model, d_ff=self.d_ff, num_heads=self.num_heads,
            d_state=self.d_state, ssm_head_dim=self.d_model, window_size=self.window_size,
            chunk_size=self.window_size, num_eidetic=self.num_eidetic, init_std=self.init_std, **MODELS[name],
        )  # fmt: skip


def train(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one model from one seed. Returns the run's record."""
    model = BMojoLM(settings.model(name))
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.param_groups(settings.weight_decay), lr=settings.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, settings))
    test = as_tensors(recall_batch(settings.task, settings.num_test, TEST_SEED))
    started, curve = time.process_time(), []
    batches = recall_batches(settings.task, settings.batch_size, seed)
    for step in range(settings.steps + 1):
        if step % settings.eval_every == 0 or step == settings.steps:
            figures = evaluate(model, test, settings.num_pairs)
            curve.append({"step": step, **figures})
            print(f"{name} seed {seed} step {step}: accuracy {figures['accuracy']:.3f}", flush=True)
        if step == settings.steps:
            break
        batch = as_tensors(next(batches))
        loss = model(batch.tokens_bt, batch.targets_bt).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    counts = count(settings.model(name), settings.seq_len)
    return {
        "model": name, "seed": seed, "settings": asdict(settings), "curve": curve, "num_params": counts.num_params,
        "state_bytes": counts.state_bytes, "cpu_time_s": time.process_time() - started, "torch": torch.__version__,
        "interventions": interventions(model, test, settings.num_pairs),
    }  # fmt: skip


def as_tensors(batch: RecallBatch) -> RecallBatch:
    """The batch with tensors in place of arrays."""
    return RecallBatch(*map(torch.from_numpy, batch))


def _lr_factor(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    progress = min(1.0, step / settings.steps)
    return min(1.0, (step + 1) / settings.warmup_steps) * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: BMojoLM, test: RecallBatch, num_pairs: int) -> dict[str, Any]:
    """Accuracy at the queries of `test` and, for bmojo layers, what the eidetic sets held when the queries came.

    Returns: accuracy; accuracy_by_distance: {"32": share, ...}, query minus value position in bins of 8; and by layer,
    where there is memory: mass (window, fading, eidetic) at the queries; kept: {class: share of such tokens in the
    set}; surprise: {class: mean percentile of the innovation score in its sequence}; accuracy_if_kept and
    accuracy_if_dropped: of the queries whose value the layer holds, and does not.
    """
    output = model(test.tokens_bt, return_memory=True)
    at_query_bq = test.query_positions_bq
    answers_bq = test.targets_bt.gather(1, at_query_bq)
    right_bq = output.logits_btv.argmax(-1).gather(1, at_query_bq) == answers_bq
    distance_bq = (at_query_bq - test.value_positions_bq) // 8 * 8
    by_distance = {str(d): _share(right_bq[distance_bq == d]) for d in distance_bq.unique().tolist()}
    figures: dict[str, Any] = {"accuracy": _share(right_bq), "accuracy_by_distance": by_distance, "layers": []}
    for memory in output.memory:
        if memory is None:
            continue
        layer = {"mass": memory.mass_bt3[test.targets_bt >= 0].mean(0).tolist()}
        if memory.kept_position_bjm is not None:
            layer |= _kept_figures(memory, test, right_bq, 2 * num_pairs, model.config.chunk_size)
        figures["layers"].append(layer)
    return figures


def interventions(model: BMojoLM, test: RecallBatch, num_pairs: int) -> dict[str, float]:
    """Accuracy if a kind of token is removed from the last layer's eidetic set: shows what the queries read there."""
    if model.config.mixers[-1] != "bmojo":
        return {}
    first_noise = 2 * num_pairs
    removed: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "without pairs": lambda index: index >= first_noise,
        "without noise": lambda index: index < first_noise,
    }
    figures = {}
    for name, allowed in removed.items():
        calls = count_from_zero()

        def select(*args: Any, allowed: Any = allowed, calls: Any = calls, **kwargs: Any) -> torch.Tensor:
            index_bjm = innovation_select(*args, **kwargs)
            last = next(calls) == model.config.mixers.count("bmojo") - 1
            return torch.where(allowed(index_bjm), index_bjm, -1) if last else index_bjm

        with patch.object(bmojo_mixer, "innovation_select", select):
            figures[name] = evaluate(model, test, num_pairs)["accuracy"]
    return figures


def _kept_figures(
    memory: LayerMemory, test: RecallBatch, right_bq: torch.Tensor, num_pair_tokens: int, chunk_size: int
) -> dict[str, Any]:
    assert memory.kept_position_bjm is not None
    assert memory.innovation_bt is not None
    chunk_bq = test.query_positions_bq // chunk_size
    slots = memory.kept_position_bjm.shape[-1]
    kept_bqm = memory.kept_position_bjm.gather(1, chunk_bq[..., None].expand(-1, -1, slots))
    held_bq = (kept_bqm == test.value_positions_bq[..., None]).any(-1)
    key_held_bq = (kept_bqm == test.value_positions_bq[..., None] - 1).any(-1)
    is_noise_bqm = kept_bqm >= num_pair_tokens
    candidates_bq = ((chunk_bq - 1) * chunk_size + 1 - num_pair_tokens).clamp_min(1)  # that are noise, W = C
    kept = {"value": _share(held_bq), "key": _share(key_held_bq)}
    kept["noise"] = float((is_noise_bqm.sum(-1) / candidates_bq).mean())
    rank_bt = memory.innovation_bt.argsort(1).argsort(1) / (memory.innovation_bt.shape[1] - 1)
    surprise = {
        "value": float(rank_bt[:, 1:num_pair_tokens:2].mean()),
        "key": float(rank_bt[:, 0:num_pair_tokens:2].mean()),
        "noise": float(rank_bt[:, num_pair_tokens:].mean()),
    }
    if_kept, if_dropped = _share(right_bq[held_bq]), _share(right_bq[~held_bq])
    return {"kept": kept, "surprise": surprise, "accuracy_if_kept": if_kept, "accuracy_if_dropped": if_dropped}


def _share(flags: torch.Tensor) -> float | None:
    return float(flags.float().mean()) if flags.numel() else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the report."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for name in options.models:
            file = options.out / f"{name}-seed{seed}.json"
            if file.exists():
                _check_same(file, settings)
                continue
            record = train(name, seed, settings)
            scratch = file.with_suffix(".tmp")
            scratch.write_text(json.dumps(record))
            os.replace(scratch, file)
    records = [json.loads(file.read_text()) for file in sorted(options.out.glob("*-seed*.json"))]
    recall_report.write(records, list(MODELS), options.report, _command(settings))
    print(f"Wrote {options.report}.md, .png and .json")


def _command(settings: Settings) -> str:
    changed = {name: value for name, value in asdict(settings).items() if value != getattr(Settings, name)}
    flags = {name.replace("_", "-"): value for name, value in changed.items()}
    words = [f"--no-{flag}" if value is False else f"--{flag} {value}" for flag, value in flags.items()]
    return " ".join(["python -m benchmarks.recall", *words])


def _check_same(file: Path, settings: Settings) -> None:
    stored = json.loads(file.read_text())["settings"]
    changed = [f"{name}={stored[name]}" for name, value in asdict(settings).items() if stored[name] != value]
    if changed:
        raise SystemExit(f"{file} was run with {', '.join(changed)}. Give these settings, or another --out.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which to run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recall"), help="folder of the runs")
    parser.add_argument(
        "--report", type=Path, default=Path(f"runs/benchmarks/recall_{time.strftime('%Y-%m-%d')}"),
        help="report to write, without suffix",
    )  # fmt: skip
    for name, value in asdict(Settings()).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=" ")
        else:
            parser.add_argument(flag, type=type(value), default=value, help=" ")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Every pair of saving and resuming: 1 to 4 workers x ZeRO 0 to 3, with moments, samples and losses compared.

    python -m benchmarks.elastic_matrix [--workers 1 2 3 4] [--zero-stages 0 1 2 3]

Each setting trains alone and saves a checkpoint half-way. Then each setting resumes each of these checkpoints. It is
compared what the trainer holds after loading (digests of every parameter and moment, by their bits), which samples
each following step reads, and its loss beside that of an unbroken run on one worker without ZeRO.

Each number of workers is one group of gloo processes, without Ray: they are started once, and do all of that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp

from data.index import TABLE_FILE, pack_index
from data.mds import BYTES, MdsWriter, array_of
from data.mixture import Mixture
from data.records import PackingFormat, SplitCounts
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train.checkpoint import Checkpoint
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.data import TokenSource
from pipelines.stages.train.device import CPU
from pipelines.stages.train.digests import whole_digests
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.loop import TrainLoop
from pipelines.stages.train.weights import build_model, model_in_parts
from pipelines.stages.train.worker import prepare_process
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.request import Request

SEQ_LEN, VOCAB_SIZE, NUM_SAMPLES = 64, 64, 240
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 12, 4
SAVED_AT, NUM_STEPS = 4, 8
TOLERANCE = 1e-6
"""Relative difference of a step's loss from that of the unbroken run: sums of another order, after some steps."""
_TOKENS, _SAVED, _RESULTS = "tokens", "saved", "results"


class Setting(NamedTuple):
    """Who trains."""

    workers: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.workers}/{self.zero_stage}"


class Trained(NamedTuple):
    """What a training did: losses and samples by step, and whether it began with what its checkpoint holds."""

    losses: dict[int, float]
    samples: dict[int, list[list[int]]]
    is_put_back: bool = True


@dataclass(frozen=True)
class Matrix:
    """What came out, by the settings that saved and that resumed."""

    settings: Sequence[Setting]
    unbroken: Mapping[Setting, Trained]
    resumed: Mapping[tuple[Setting, Setting], Trained]

    @property
    def reference(self) -> Trained:
        """The unbroken run of the first setting."""
        return self.unbroken[self.settings[0]]

    def loss_difference(self, trained: Trained) -> float:
        """The largest relative difference of a loss from the reference's at the same step."""
        differences = [abs(loss / self.reference.losses[step] - 1) for step, loss in trained.losses.items()]
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def faults(self) -> list[str]:
        """What is not as it should be, in words; none if all is well."""
        found = [
            f"{setting}, unbroken: {fault}"
            for setting, trained in self.unbroken.items()
            for fault in self._faults_of(trained, range(1, NUM_STEPS + 1))
        ]
        return found + [
            f"{saved} resumed on {resumed}: {fault}"
            for (saved, resumed), trained in self.resumed.items()
            for fault in self._faults_of(trained, range(SAVED_AT + 1, NUM_STEPS + 1))
        ]

    def _faults_of(self, trained: Trained, steps: range) -> list[str]:
        found = []
        if not trained.is_put_back:
            found.append("parameters or moments are not those of the checkpoint")
        if list(trained.losses) != list(steps):
            found.append(f"steps {list(trained.losses)} instead of {list(steps)}")
        if any(samples != self.reference.samples[step] for step, samples in trained.samples.items()):
            found.append("a step has other samples")
        if not self.loss_difference(trained) <= TOLERANCE:
            found.append(f"a loss differs by {self.loss_difference(trained):.1e}")
        return found

    def table(self) -> str:
        """Markdown: the largest relative difference of a loss after resuming, for each pair."""
        lines = [
            "| saved by | unbroken | " + " | ".join(map(str, self.settings)) + " |",
            "|---|" + "---|" * (len(self.settings) + 1),
        ]
        for saved in self.settings:
            cells = [self.unbroken[saved], *(self.resumed[saved, resumed] for resumed in self.settings)]
            lines.append(f"| {saved} | " + " | ".join(_in_words(self.loss_difference(cell)) for cell in cells) + " |")
        return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bmojo-elastic-") as folder:
        settings = [Setting(workers, stage) for workers in options.workers for stage in options.zero_stages]
        matrix = run_matrix(settings, Path(folder))
    faults = matrix.faults()
    worst = max(matrix.loss_difference(trained) for trained in matrix.resumed.values())
    print(
        f"{len(matrix.resumed)} pairs in {time.monotonic() - began:.0f} s: workers/ZeRO stage that saved, and those "
        f"that resumed. Cells: largest relative difference of a loss in steps {SAVED_AT + 1} to {NUM_STEPS} from the "
        f"unbroken run of {matrix.settings[0]}.\n\n{matrix.table()}\n"
    )
    if faults:
        print("FAULTS:", *faults, sep="\n  ")
        return 1
    print(
        f"All parameters and moments have the digests of their checkpoint, all steps the same samples, and losses "
        f"differ by at most {worst:.1e} (allowed: {TOLERANCE:g})."
    )
    return 0


def run_matrix(settings: Sequence[Setting], folder: Path) -> Matrix:
    """Do all of it in processes, with `folder` for what they write."""
    write_tokens(folder / _TOKENS)
    for name in (_SAVED, _RESULTS):
        (folder / name).mkdir()
    context = mp.get_context("spawn")
    processes = []
    for number in sorted({setting.workers for setting in settings}):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(number):
            processes.append(context.Process(target=_rank, args=(rank, number, port, settings, folder), daemon=True))
            processes[-1].start()
    try:
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes):
                raise RuntimeError("A process of the matrix failed; its error is above.")
            time.sleep(0.1)
        if any(process.exitcode for process in processes):
            raise RuntimeError("A process of the matrix failed; its error is above.")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Matrix(
        settings,
        {setting: _read(folder, setting) for setting in settings},
        {(saved, resumed): _read(folder, resumed, saved) for saved in settings for resumed in settings},
    )


def write_tokens(folder: Path) -> None:
    """A split of random samples with a document every 20 tokens, in several shards."""
    rng = np.random.default_rng(0)
    writer = MdsWriter(folder / "train" / "slice-00000", {"tokens": array_of("uint16"), "doc_starts": BYTES}, 1 << 13)
    for _ in range(NUM_SAMPLES):
        starts = np.flatnonzero(rng.random(SEQ_LEN) < 1 / 20).astype("<i4")
        writer.write({"tokens": rng.integers(1, VOCAB_SIZE, SEQ_LEN + 1), "doc_starts": starts.tobytes()})
    packing = PackingFormat(
        seq_len=SEQ_LEN,
        eod_id=0,
        vocab_size=VOCAB_SIZE,
        token_dtype="uint16",
        tokenizer_sha256="0" * 64,
        has_loss_mask=False,
    )
    counts = SplitCounts(
        num_documents=1,
        num_samples=NUM_SAMPLES,
        num_tokens=NUM_SAMPLES * SEQ_LEN,
        num_bytes=1,
        num_cut_documents=0,
    )
    (folder / "train" / TABLE_FILE).write_bytes(pack_index(packing, counts, [(0, shard) for shard in writer.finish()]))


class _Silent:
    """A metric sink that keeps nothing: the checkpoint's history has the losses."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_notice(self, text: str) -> None: ...

    def flush(self) -> bool:
        return True

    def request(self) -> Request:
        return Request.NONE

    def ask(self, request: Request) -> None: ...


def _rank(rank: int, workers: int, port: int, settings: Sequence[Setting], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [setting for setting in settings if setting.workers == workers]
    prepare_process(_config(own[0]), rank)
    dist.init_process_group("gloo")
    for setting in own:
        _keep(folder, _train(setting, folder, folder / _SAVED / _name(setting), None), setting)
    (folder / f"done-{workers}-{rank}").touch()
    while len(list(folder.glob("done-*"))) < sum({setting.workers for setting in settings}):
        time.sleep(0.05)
    for setting in own:
        for saved in settings:
            checkpoint = Checkpoint(folder / _SAVED / _name(saved) / step_dir(SAVED_AT))
            target = folder / f"{_name(saved)}-on-{_name(setting)}"
            _keep(folder, _train(setting, folder, target, checkpoint), setting, saved)
            dist.barrier()
            if rank == 0:
                shutil.rmtree(target)
    dist.barrier()


def _train(setting: Setting, folder: Path, target: Path, resumed: Checkpoint | None) -> Trained:
    """What a worker of the train stage does. A collective of the group."""
    config, tokens = _config(setting), ArtifactDir.at(folder / _TOKENS)
    job = TrainJob(
        config=config,
        model=config.model,
        num_steps=NUM_STEPS,
        seq_len=SEQ_LEN,
        artifact=ArtifactDir.at(target),
        sources=(TokenSource(_TOKENS, tokens, NUM_SAMPLES, has_validation=False),),
        mixture=Mixture.of_one(),
        start=None,
        resume_step=None,
        metrics=_Silent(),
    )
    if resumed is not None:
        job = replace(job, resume_step=resumed.state.step)
    stream = TokenStream(
        [token_split(tokens, "train")],
        micro_batch_size=config.worker_micro_batch_size,
        global_batch_size=config.global_batch_size,
        order=StreamOrder(config.seed, block_samples=64),
        worker=Worker(dist.get_rank(), dist.get_world_size()),
    )
    with closing(stream):
        model, parts = model_in_parts(job) if config.backend.shards_parameters else (build_model(job), ())
        trainer = config.backend.start(model, config, CPU, parts)
        loop = TrainLoop(job, trainer, stream, {}, resumed)
        is_put_back = resumed is None or whole_digests(trainer.pieces()) == resumed.state.digests
        first = stream.first_step
        loop.run()
        samples = {step + 1: _samples(stream, step) for step in range(first, NUM_STEPS)}
    losses = {step: loss for step, loss in loop.curves.history["train/loss"] if step > first}
    return Trained(losses, samples, is_put_back)


def _samples(stream: TokenStream, step: int) -> list[list[int]]:
    """The places of all samples of a global batch, over all workers."""
    of_ranks: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, [list(place) for place in stream.places(step)])
    return sorted(place for places in of_ranks for place in places)


def _config(setting: Setting) -> TrainStageConfig:
    fields: dict[str, Any] = {
        "kind": "train",
        "needs": (_TOKENS,),
        "model": {
            "pattern": "(bmojo,mamba2)*1",
            "d_model": 32,
            "num_heads": 2,
            "window_size": 16,
            "chunk_size": 8,
            "num_eidetic": 4,
            "d_state": 16,
            "ssm_head_dim": 16,
            "vocab_size": VOCAB_SIZE,
        },
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "max_steps": NUM_STEPS,
        "warmup_steps": 2,
        "log_every_steps": 1,
        "checkpoint_every_steps": SAVED_AT,
        "backend": {"kind": "deepspeed", "zero_stage": setting.zero_stage},
        "resources": {"num_workers": setting.workers},
    }
    return TrainStageConfig.model_validate(fields)


def _name(setting: Setting) -> str:
    return f"{setting.workers}-workers-zero-{setting.zero_stage}"


def _file(folder: Path, setting: Setting, saved: Setting | None) -> Path:
    source = f"{_name(saved)}-on-" if saved is not None else ""
    return folder / _RESULTS / f"{source}{_name(setting)}.json"


def _keep(folder: Path, trained: Trained, setting: Setting, saved: Setting | None = None) -> None:
    if dist.get_rank() == 0:
        _file(folder, setting, saved).write_text(json.dumps(trained._asdict()))


def _read(folder: Path, setting: Setting, saved: Setting | None = None) -> Trained:
    read = json.loads(_file(folder, setting, saved).read_text())
    return Trained(
        {int(step): loss for step, loss in read["losses"].items()},
        {int(step): samples for step, samples in read["samples"].items()},
        read["is_put_back"],
    )


def _in_words(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.0e}" if math.isfinite(difference) else "not finite"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--zero-stages", type=int, nargs="+", default=[0, 1, 2, 3])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""What a pipeline asks of this machine that it cannot have: refused before anything starts, by `plan` and by `run`."""

from __future__ import annotations

import os

from pipelines.config import PipelineConfig
from pipelines.engine.stage import StageConfig
from pipelines.errors import ConfigError, FieldError
from pipelines.stages.tokenize.stage import TokenizeStageConfig
from pipelines.stages.tokenizer.stage import TokenizerStageConfig
from pipelines.stages.train.config import TrainStageConfig

SLOTS_PER_CORE = 16  # CPU slots are Ray's bookkeeping and may exceed the cores; this many more is a mistake
FEWEST_SLOTS = 64  # allowed on any machine


def check_pipeline(config: PipelineConfig) -> None:
    """Refuse what must fail later: a vocabulary without room, unknown kernels, a local cluster that is too small.

    Raises: ConfigError: names the field, what it asks, what there is and what would do.
    """
    _check_kernels()
    for name, stage in config.stages.items():
        if isinstance(stage, TrainStageConfig):
            _check_vocabulary(config, name, stage)
        if config.cluster.address == "local":
            _check_local_cpus(config, name, stage)
            _check_local_gpus(name, stage)


def _check_kernels() -> None:
    from kernels.dispatch import PATHS

    asked = os.environ.get("BMOJO_KERNELS")
    if asked is not None and asked not in PATHS:
        raise ConfigError(f"BMOJO_KERNELS={asked!r}: there are no such kernels. Set it to one of {', '.join(PATHS)}.")


def _check_vocabulary(config: PipelineConfig, name: str, train: TrainStageConfig) -> None:
    if train.model.vocab_size is None:
        return
    for tokenize in (config.stages[need] for need in train.needs):
        for tokenizer_name in tokenize.needs if isinstance(tokenize, TokenizeStageConfig) else ():
            tokenizer = config.stages[tokenizer_name]
            if not isinstance(tokenizer, TokenizerStageConfig) or tokenizer.load is not None:
                continue
            if train.model.vocab_size < tokenizer.vocab_size:
                raise FieldError(
                    ("stages", name, "model", "vocab_size"),
                    f"found {train.model.vocab_size}, which is less than the {tokenizer.vocab_size} ids of the "
                    f"tokenizer {tokenizer_name!r} ({tokenizer_name}.vocab_size). Leave it out, or set it to "
                    f"{tokenizer.vocab_size} or more.",
                )


def _check_local_cpus(config: PipelineConfig, name: str, stage: StageConfig) -> None:
    workers, cpus = stage.resources.num_workers, stage.resources.cpus_per_worker
    at_once = workers if isinstance(stage, TrainStageConfig) else 1  # other stages' tasks can wait for one another
    cores = os.cpu_count() or 1
    limit = config.cluster.num_cpus
    if limit is not None and at_once * cpus > limit:
        raise FieldError(
            ("stages", name, "resources"),
            f"{at_once} workers of {cpus:g} CPUs do not fit into cluster.num_cpus={limit}. Lower num_workers or "
            "cpus_per_worker, or raise cluster.num_cpus.",
        )
    most = limit or max(FEWEST_SLOTS, SLOTS_PER_CORE * cores)
    if limit is None and workers * cpus > most:
        raise FieldError(
            ("stages", name, "resources"),
            f"{workers} workers of {cpus:g} CPUs are far more than this machine's {cores} cores can run "
            f"(cluster.address is local; at most {most} CPUs are accepted). Lower num_workers or cpus_per_worker, or "
            "set cluster.address to a cluster that has them.",
        )


def _check_local_gpus(name: str, stage: StageConfig) -> None:
    workers, gpus = stage.resources.num_workers, stage.resources.gpus_per_worker
    if not gpus:
        return
    import torch

    present = torch.cuda.device_count()
    needed = workers * gpus if isinstance(stage, TrainStageConfig) else gpus
    if needed > present:
        raise FieldError(
            ("stages", name, "resources", "gpus_per_worker"),
            f"found {gpus:g} for each of {workers} workers, but this machine has {present} GPUs (cluster.address is "
            "local). Set it to 0 to run on the CPU, or cluster.address to a cluster that has them.",
        )

"""Settings of training on AWS Trainium through TorchNeuron, which never ran on the hardware (docs/neuron.md)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pipelines.stages.train.backends.base import FLOAT_BYTES, BackendConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from ray.train.torch import TorchConfig
    from torch import nn

    from bmojo import BMojoLM
    from pipelines.stages.train.config import TrainStageConfig
    from pipelines.stages.train.planning.states import ModelSize, StateBytes
    from pipelines.stages.train.trainer import Trainer

LENGTH_MULTIPLE = 128
"""Of tokens in a sequence: partitions of a NeuronCore's memory, and what AWS's kernels and compiler expect."""


REFUSED_RULES = {"random": "needs 64-bit hashes, which NeuronCores do not have"}
"""Selection rules that have no static path, and why."""


class NeuronConfig(BackendConfig):
    """AWS Trainium 2 and 3 by TorchNeuron (device `neuron`), or its rehearsal on the CPU."""

    kind: Literal["neuron"]
    device: Literal["neuron", "cpu"] = Field(
        "neuron",
        description="neuron: a logical NeuronCore for each worker. cpu: a rehearsal of the same training with gloo, on "
        "any machine and without AWS's packages.",
    )
    parallel: Literal["zero1", "fsdp2"] = Field(
        "zero1",
        description="zero1: gradients are all-reduced and optimizer state is sharded. fsdp2: parameters and gradients "
        "too, by torch's fully_shard, a block at a time.",
    )
    compile: Literal["blocks", "none"] = Field(
        "blocks",
        description="blocks: each block, and the last norm with head and loss, is one compiled graph. none: operators "
        "run one by one; slow, to look for faults.",
    )
    core_assignment: Literal["local_rank", "ray"] = Field(
        "local_rank",
        description="Which core a worker takes. local_rank: the one of its number on its machine, as under torchrun; "
        "the training must have whole machines. ray: one of those that Ray gave to the machine's workers.",
    )
    cpu_fallback: Literal["error", "warn", "allow"] = Field(
        "error",
        description="What operators lead to that ran on the host's CPU in the first steps: the end of training, a "
        "warning, or nothing.",
    )
    cache_dir: str | None = Field(
        None, description="Folder of compiled graphs, which a later start reads; null: TorchNeuron's own default."
    )
    compiler_flags: str = Field("", description="Added to NEURON_CC_FLAGS, the options of neuronx-cc.")

    memory_advice: ClassVar[str] = "train.backend.parallel: fsdp2"

    def check(self, train: TrainStageConfig) -> None:
        """Refuse what cannot run there, without the hardware or its packages."""
        cores, gpus = train.resources.neuron_cores_per_worker, train.resources.gpus_per_worker
        if gpus:
            raise ValueError(
                f"backend.kind=neuron runs on NeuronCores, but resources.gpus_per_worker is {gpus:g}. Set it to 0, or "
                "use backend: {kind: deepspeed}."
            )
        if self.device == "neuron" and cores != 1:
            raise ValueError(
                f"backend.kind=neuron needs one logical NeuronCore per worker: found resources.neuron_cores_per_worker="
                f"{cores:g}, expected 1, and as many num_workers as cores are to train. To rehearse without the "
                "hardware, set backend.device: cpu."
            )
        if self.device == "cpu" and cores:
            raise ValueError(
                f"backend.device=cpu is a rehearsal without NeuronCores, but resources.neuron_cores_per_worker is "
                f"{cores:g}. Set it to 0, or backend.device to neuron."
            )
        if train.optimizer.kind != "adamw":
            raise ValueError(
                f"backend.kind=neuron updates by adamw alone; found optimizer.kind={train.optimizer.kind}, which sends "
                "matrices between workers in uneven parts. Use adamw, or backend: {kind: deepspeed}."
            )
        if train.activation_checkpointing not in ("none", "block"):
            raise ValueError(
                f"activation_checkpointing={train.activation_checkpointing} lies inside a block, which is one graph "
                "with backend.kind=neuron. Use block or none."
            )
        rule = train.model.selection
        if rule in REFUSED_RULES:
            raise ValueError(f"model.selection={rule} {REFUSED_RULES[rule]}. Use another selection.")
        tau = train.model.innovation_tau
        if tau is not None and tau != (near := _float32(tau)):
            raise ValueError(
                f"model.innovation_tau={tau} is not a float32, in which NeuronCores rank tokens exactly. Set it to "
                f"{near}."
            )
        if train.profile is not None and self.device == "neuron":
            raise ValueError(
                "profile records CPUs and GPUs only. Leave it out; docs/neuron.md names AWS's own profiler."
            )

    def check_seq_len(self, seq_len: int) -> None:
        """Refuse lengths that the device's tiles do not divide."""
        if seq_len % LENGTH_MULTIPLE:
            near = -(-seq_len // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
            raise ValueError(
                f"seq_len={seq_len} is not a multiple of {LENGTH_MULTIPLE}, which backend.kind=neuron needs: its "
                f"compiler works on tiles of that size. Set seq_len to {near}."
            )

    def hashed(self) -> dict[str, Any]:
        """Nothing: where and by which graphs the same steps are taken changes rounding only."""
        return {}

    def states(self, size: ModelSize, num_workers: int, on_gpu: bool, accumulates: bool) -> StateBytes:
        """By the layout of backends/neuron_sharding.py, all in float32; counted, not measured on the hardware."""
        from pipelines.stages.train.planning.states import StateBytes

        whole = FLOAT_BYTES * size.num_params
        share = -(-whole // num_workers)
        held = share if self.parallel == "fsdp2" else whole
        gathers = num_workers > 1 and self.parallel == "zero1"
        return StateBytes(
            parameters=held,
            optimizer=-(-FLOAT_BYTES * size.num_moments // num_workers),
            gradients=held if accumulates else 0,
            fresh=held,
            buckets=0,
            update=share + whole if gathers else 0,
        )

    def traffic(self, num_params: int, num_workers: int, num_micro_batches: int) -> float:
        """zero1: one all-reduce and one all-gather per step. fsdp2: two all-gathers and a reduce-scatter per micro
        batch."""
        whole = FLOAT_BYTES * num_params * (num_workers - 1) / num_workers
        return 3 * whole if self.parallel == "zero1" else 3 * whole * num_micro_batches

    def environment(self, on_gpu: bool) -> dict[str, str]:
        """Nothing: what TorchNeuron reads is set before the process group is made (train/neuron_ray.py)."""
        return {}

    def worker_device(self, on_gpu: bool) -> torch.device:
        """The NeuronCore of this process."""
        if self.device == "cpu":
            return super().worker_device(on_gpu=False)
        from pipelines.neuron import runtime

        return runtime.device()

    def ray_train(self, timeout_s: float) -> TorchConfig:
        """A process group over NeuronCores."""
        if self.device == "cpu":
            return super().ray_train(timeout_s)
        from pipelines.stages.train.neuron_ray import NeuronTorchConfig

        return NeuronTorchConfig(
            timeout_s=int(timeout_s),
            core_assignment=self.core_assignment,
            cache_dir=self.cache_dir,
            compiler_flags=self.compiler_flags,
        )

    def worker_runtime_env(self) -> dict[str, Any]:
        """Keep `import torch` from loading TorchNeuron before the environment says which core is whose."""
        return {"env_vars": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}} if self.device == "neuron" else {}

    @property
    def shards_parameters(self) -> bool:
        """Not at the start: each block is whole for a moment."""
        return False

    def start(
        self, model: BMojoLM, config: TrainStageConfig, device: torch.device, parts: Iterable[nn.Module] = ()
    ) -> Trainer:
        """See BackendConfig."""
        from pipelines.stages.train.backends.neuron import NeuronTrainer

        return NeuronTrainer(model, config, self, device)


def _float32(x: float) -> float:
    """The nearest number in 32 bits."""
    near: float = struct.unpack("f", struct.pack("f", x))[0]
    return near

"""The backends that there are: one config each. Importing this imports no backend's library."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from base.config import StrictConfig
from pipelines.stages.train.backends.base import FLOAT_BYTES, BackendConfig
from pipelines.stages.train.backends.neuron_config import NeuronConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from bmojo import BMojoLM
    from pipelines.stages.train.config import TrainStageConfig
    from pipelines.stages.train.planning.states import ModelSize, StateBytes
    from pipelines.stages.train.trainer import Trainer

BUCKET_NUMEL = 500_000_000  # DeepSpeed's reduce_bucket_size, which we leave as it is
GATHERED_NUMEL = 1_000_000_000  # its stage3_max_live_parameters


class OffloadConfig(StrictConfig):
    """Keep state that ZeRO has sharded in host memory instead of the GPU's."""

    optimizer: bool = Field(True, description="Keep optimizer state and its update on the CPU (ZeRO 1-3).")
    parameters: bool = Field(False, description="Keep parameters on the CPU between uses (ZeRO 3).")


class DeepSpeedConfig(BackendConfig):
    """DeepSpeed ZeRO, on GPUs or, with gloo, on the CPU."""

    kind: Literal["deepspeed"]
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="What DeepSpeed shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters.",
    )
    offload: OffloadConfig | None = Field(None, description="Move sharded state to host memory (GPU only).")

    memory_advice: ClassVar[str] = "a higher train.backend.zero_stage"

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> DeepSpeedConfig:
        if self.offload is not None and self.offload.optimizer and self.zero_stage == 0:
            raise ValueError("offload.optimizer needs zero_stage 1, 2 or 3; found 0.")
        if self.offload is not None and self.offload.parameters and self.zero_stage != 3:
            raise ValueError(f"offload.parameters needs zero_stage 3; found {self.zero_stage}.")
        return self

    def check(self, train: TrainStageConfig) -> None:
        """Refuse offload without a GPU or with Muon, and NeuronCores."""
        if train.resources.neuron_cores_per_worker:
            raise ValueError(
                f"backend.kind=deepspeed cannot use resources.neuron_cores_per_worker="
                f"{train.resources.neuron_cores_per_worker:g}: DeepSpeed has no accelerator for AWS Neuron. Set "
                "backend: {kind: neuron, parallel: zero1} (or fsdp2), or leave neuron_cores_per_worker out."
            )
        if self.offload is not None and train.optimizer.kind == "muon":
            raise ValueError(
                "optimizer: muon needs whole matrices on the GPU; leave backend.offload out, or use adamw."
            )
        if self.offload is not None and not train.on_gpu:
            raise ValueError(
                "backend.offload moves state from a GPU to the host, but resources.gpus_per_worker is 0; leave it out."
            )

    def hashed(self) -> dict[str, Any]:
        """Nothing: what is sharded, and where it lies, changes rounding only."""
        return {}

    def states(self, size: ModelSize, num_workers: int, on_gpu: bool, accumulates: bool) -> StateBytes:
        """As DeepSpeed lays them out under the settings of backends/deepspeed.py; counted by hand on real steps.

        ZeRO 0 updates the parameters themselves. From 1 on DeepSpeed keeps a float32 copy of a worker's share beside
        them, which AdamW updates, and flattens gradients into one more. On a GPU its buckets have a fixed size.
        """
        from pipelines.stages.train.planning.states import StateBytes

        stage = 0 if on_gpu and num_workers == 1 and self.offload is None else self.zero_stage  # as the trainer does
        whole, num_params = FLOAT_BYTES * size.num_params, size.num_params
        kept = FLOAT_BYTES * size.num_moments
        share = -(-whole // num_workers)
        bucket = FLOAT_BYTES * BUCKET_NUMEL
        flattened = 0 if num_workers == 1 else min(whole, bucket)
        gradients = whole if stage < 2 else share
        fresh = 0 if stage == 3 or (stage == 2 and on_gpu) else whole  # in DeepSpeed's bucket, which counts by itself
        if stage == 3:
            gathered = FLOAT_BYTES * min(num_params, GATHERED_NUMEL)
            buckets = gathered + (bucket if on_gpu else min(whole, bucket))
        else:
            buckets = 2 * bucket if on_gpu and stage else 0  # one is filled while the other is sent
        if not on_gpu and stage:
            # Blocks of the first parameters, which flat copies cannot use, and gloo's own copy of what it gathers.
            buckets += (2 if stage == 3 else 1) * (1 if num_workers == 1 else 2) * whole
        if not on_gpu and stage < 3:
            # In a heap no hole between gradients has room for their flat copy: it lies above all there has been. What
            # an update makes flat then fits into its place.
            buckets += flattened
        states = StateBytes(
            parameters=share if stage == 3 else whole,
            optimizer=share - (-kept // num_workers) if stage else kept,
            gradients=gradients if accumulates or stage == 3 or (stage == 2 and on_gpu) else 0,
            fresh=0 if accumulates and stage < 2 else fresh,
            buckets=buckets,
            update=(share if stage else flattened) if on_gpu or stage == 3 or num_workers == 1 else 0,
        )
        if self.offload is None:
            return states
        if self.offload.optimizer:
            states = replace(states, host=states.optimizer + share, optimizer=0, update=0)
        if self.offload.parameters:
            states = replace(states, host=states.host + states.parameters, parameters=0)
        return states

    def traffic(self, num_params: int, num_workers: int, num_micro_batches: int) -> float:
        """ZeRO 0 and 1 reduce once per step, 2 per micro batch; 3 also gathers parameters for forward and backward.

        All in float32 (docs/design/0021). S. Rajbhandari et al., ZeRO (arXiv:1910.02054), section 7.
        """
        whole = FLOAT_BYTES * num_params * (num_workers - 1) / num_workers
        if self.zero_stage <= 1:
            return 2 * whole
        return (3 if self.zero_stage == 3 else 1) * whole * num_micro_batches + (whole if self.zero_stage == 2 else 0)

    def environment(self, on_gpu: bool) -> dict[str, str]:
        """DeepSpeed chooses its accelerator when it is imported."""
        return {} if on_gpu else {"DS_ACCELERATOR": "cpu"}

    @property
    def shards_parameters(self) -> bool:
        """ZeRO 3 does."""
        return self.zero_stage == 3

    def start(
        self, model: BMojoLM, config: TrainStageConfig, device: torch.device, parts: Iterable[nn.Module] = ()
    ) -> Trainer:
        """Import DeepSpeed, which only workers do, and start its engine."""
        from pipelines.stages.train.backends.deepspeed import DeepSpeedTrainer

        return DeepSpeedTrainer(model, config, self, device, parts)


AnyBackendConfig = Annotated[DeepSpeedConfig | NeuronConfig, Field(discriminator="kind")]

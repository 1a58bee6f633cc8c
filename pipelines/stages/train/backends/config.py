"""Settings of the trainers' backends, and what must be known of a backend before it runs.

Importing this imports no backend: pipelines are checked where none of them is installed.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from base.config import StrictConfig

if TYPE_CHECKING:
    import torch

    from bmojo import BMojoLM
    from pipelines.stages.train.config import TrainStageConfig
    from pipelines.stages.train.trainer import Trainer

FLOAT_BYTES = 4
ADAMW_MOMENTS = 2


class BackendConfig(StrictConfig):
    """Settings of one backend. `kind` is narrowed to a Literal by each subclass."""

    kind: str = Field(description="What updates the weights.")

    memory_advice: ClassVar[str]
    """Setting that lowers the memory per worker, for the message of a GPU that has run out of it."""

    @abstractmethod
    def check(self, on_gpu: bool) -> None:
        """Raises: ValueError: these settings cannot run on such workers."""

    @abstractmethod
    def hashed(self) -> dict[str, Any]:
        """The settings as they enter the fingerprint, beside the stage's own (docs/design/0022)."""

    @abstractmethod
    def state_bytes(self, num_params: int, num_workers: int) -> int:
        """Bytes per worker of parameters, gradients and optimizer state."""

    @abstractmethod
    def environment(self, on_gpu: bool) -> dict[str, str]:
        """Environment variables that a worker sets before it imports the backend's library."""

    @abstractmethod
    def start(self, model: BMojoLM, config: TrainStageConfig, device: torch.device) -> Trainer:
        """Hand the model over to a trainer of this backend. A collective."""


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

    def check(self, on_gpu: bool) -> None:
        """Refuse offload without a GPU."""
        if self.offload is not None and not on_gpu:
            raise ValueError(
                "backend.offload moves state from a GPU to the host, but resources.gpus_per_worker is 0; leave it out."
            )

    def hashed(self) -> dict[str, Any]:
        """Nothing: what is sharded, and where it lies, changes rounding only."""
        return {}

    def state_bytes(self, num_params: int, num_workers: int) -> int:
        """Parameters, gradients, AdamW's moments and master copy, each sharded from its ZeRO stage on."""
        share = num_params / num_workers
        parameters = share if self.zero_stage >= 3 else num_params
        gradients = share if self.zero_stage >= 2 else num_params
        optimizer = (ADAMW_MOMENTS + 1) * (share if self.zero_stage >= 1 else num_params)
        return int(FLOAT_BYTES * (parameters + gradients + optimizer))

    def environment(self, on_gpu: bool) -> dict[str, str]:
        """DeepSpeed chooses its accelerator when it is imported."""
        return {} if on_gpu else {"DS_ACCELERATOR": "cpu"}

    def start(self, model: BMojoLM, config: TrainStageConfig, device: torch.device) -> Trainer:
        """Import DeepSpeed, which only workers do, and start its engine."""
        from pipelines.stages.train.backends.deepspeed import DeepSpeedTrainer

        return DeepSpeedTrainer(model, config, self, device)


# The table of backends: a second one makes this a union.
AnyBackendConfig = Annotated[DeepSpeedConfig, Field(discriminator="kind")]

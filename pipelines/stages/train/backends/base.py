"""What must be known of a trainer's backend before it runs.

Importing this imports no backend: pipelines are checked where none of them is installed.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from base.config import StrictConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from ray.train.torch import TorchConfig
    from torch import nn

    from bmojo import BMojoLM
    from pipelines.stages.train.config import TrainStageConfig
    from pipelines.stages.train.planning.states import ModelSize, StateBytes
    from pipelines.stages.train.trainer import Trainer

FLOAT_BYTES = 4


class BackendConfig(StrictConfig):
    """Settings of one backend. `kind` is narrowed to a Literal by each subclass."""

    kind: str = Field(description="What updates the weights.")

    memory_advice: ClassVar[str]
    """Setting that lowers the memory per worker, for the message of a GPU that has run out of it."""

    @abstractmethod
    def check(self, train: TrainStageConfig) -> None:
        """Raises: ValueError: a training with these settings cannot run on this backend."""

    def check_seq_len(self, seq_len: int) -> None:
        """Raises: ValueError: sequences of so many tokens cannot be trained on."""

    @abstractmethod
    def hashed(self) -> dict[str, Any]:
        """The settings as they enter the fingerprint, beside the stage's own (docs/design/0022)."""

    @abstractmethod
    def states(self, size: ModelSize, num_workers: int, on_gpu: bool, accumulates: bool) -> StateBytes:
        """Bytes per worker of parameters, gradients and optimizer state. accumulates: over several micro batches."""

    @abstractmethod
    def traffic(self, num_params: int, num_workers: int, num_micro_batches: int) -> float:
        """Bytes that a worker sends in an optimizer step."""

    @abstractmethod
    def environment(self, on_gpu: bool) -> dict[str, str]:
        """Environment variables that a worker sets before it imports the backend's library."""

    def worker_device(self, on_gpu: bool) -> torch.device:
        """The device of this worker, once its process group is there."""
        from pipelines.stages.train.device import pick_in_worker

        return pick_in_worker(on_gpu)

    def ray_train(self, timeout_s: float) -> TorchConfig:
        """How Ray Train makes the process group. Args: timeout_s: of a collective."""
        from ray.train.torch import TorchConfig

        return TorchConfig(timeout_s=int(timeout_s))

    def worker_runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment of the workers: what must be set before they import torch."""
        return {}

    @property
    @abstractmethod
    def shards_parameters(self) -> bool:
        """Whether no worker need hold the whole model, not even at the start."""

    @abstractmethod
    def start(
        self, model: BMojoLM, config: TrainStageConfig, device: torch.device, parts: Iterable[nn.Module] = ()
    ) -> Trainer:
        """Hand the model over to a trainer of this backend. A collective.

        Args: parts: of a model without values (bmojo.hollow), each with its values when it is asked for.
        """

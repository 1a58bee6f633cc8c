"""Bytes per worker of what has the size of the model: parameters, gradients, optimizer state, and copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from bmojo import BMojoLM
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.optimizers.build import state_names
from pipelines.stages.train.planning.activations import Activations


class ModelSize(NamedTuple):
    """Elements of a model's parameters, and of what an optimizer keeps of them: moments, averages of weights."""

    num_params: int
    num_moments: int

    @property
    def checkpoint_bytes(self) -> int:
        """Both, in float32."""
        return 4 * (self.num_params + self.num_moments)


def model_size(train: TrainStageConfig) -> ModelSize:
    """Of a training whose model has a vocab_size."""
    with torch.device("meta"):
        model = BMojoLM(train.model)
    names = state_names(model, train)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return ModelSize(sum(parameters.values()), sum(count * len(names[name]) for name, count in parameters.items()))


@dataclass(frozen=True)
class StateBytes:
    """Bytes per worker, on its device but for `host`. A backend says them (BackendConfig.states)."""

    parameters: int
    optimizer: int
    """Moments and master copies."""
    gradients: int
    """That are there while a forward runs: of the micro batches before."""
    fresh: int
    """Gradients that one backward adds to these, until it ends."""
    buckets: int
    """Of communication and of gathered parameters, there all the time; in a heap also what copies leave."""
    update: int
    """Beside both while they are reduced and the weights updated; then no activations are there."""
    host: int = 0
    """Offloaded to the host's memory."""

    @property
    def fixed(self) -> int:
        """Those that are there all the time."""
        return self.parameters + self.optimizer + self.buckets

    @property
    def total(self) -> int:
        """Without activations."""
        return self.fixed + self.gradients + self.fresh + self.update

    def beside(self, activations: Activations) -> int:
        """At most, together with the activations of a micro batch, minus what is `fixed`."""
        late = activations.bottom + self.fresh
        return self.gradients + max(activations.peak, late, self.fresh + self.update)

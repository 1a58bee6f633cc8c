"""The model that is evaluated, before an actor loads it: small and picklable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bmojo import BMojoLM
from pipelines.stages.evaluate.language_model import LanguageModel, NativeModel
from pipelines.stages.models import load_model
from pipelines.stages.train import device
from pipelines.stages.train.weights import load_checkpoint
from pipelines.storage.artifact import ArtifactDir


class Subject(Protocol):
    """A model, trained and as it was before its first step."""

    def load(self, on_gpu: bool) -> LanguageModel:
        """The model on the device of this process. Raises DamagedError."""

    def untrained(self, like: LanguageModel | None, on_gpu: bool) -> LanguageModel:
        """The same architecture before its first step.

        Args: like: a model of this architecture, if one was loaded.
        """


@dataclass(frozen=True)
class TrainedModel:
    """Of a train stage. Attributes: step: of a kept checkpoint; None: the final model, in the folder `path`."""

    artifact: ArtifactDir
    path: str
    step: int | None = None

    def load(self, on_gpu: bool) -> NativeModel:
        """See Subject."""
        if self.step is None:
            model = load_model(self.artifact, self.path)
        else:
            model = load_checkpoint(self.artifact, self.path, self.step)
        return _placed(model, on_gpu)

    def untrained(self, like: LanguageModel | None, on_gpu: bool) -> NativeModel:
        """See Subject. Its weights are those of seed 0."""
        if isinstance(like, NativeModel):
            return _placed(BMojoLM(like.module.config), on_gpu)
        model = load_model(self.artifact, self.path)
        model.init_weights(seed=0)
        return _placed(model, on_gpu)


def _placed(model: BMojoLM, on_gpu: bool) -> NativeModel:
    return NativeModel(model.to(device.pick(on_gpu)).eval())

"""The model that is evaluated, before an actor loads it: small and picklable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bmojo import BMojoLM
from pipelines.stages.evaluate.external import ExternalModelConfig, fetch
from pipelines.stages.evaluate.external_model import load_external_model, load_external_tokenizer
from pipelines.stages.evaluate.language_model import LanguageModel, NativeModel, TextTokenizer
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

    def tokenizer(self) -> TextTokenizer | None:
        """A tokenizer of its own; None: it reads the ids of the texts that it is evaluated on."""


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

    def tokenizer(self) -> None:
        """None: see Subject."""
        return None


@dataclass(frozen=True)
class ExternalModel:
    """A model that no stage trained. Attributes: version: of its files, with which they are compared."""

    config: ExternalModelConfig
    version: str

    def load(self, on_gpu: bool) -> LanguageModel:
        """See Subject. Raises also UserError: transformers does not know it, or its files have changed."""
        return load_external_model(fetch(self.config, self.version), on_gpu)

    def untrained(self, like: LanguageModel | None, on_gpu: bool) -> LanguageModel:
        """Raises NotImplementedError: what it was before training is not known."""
        raise NotImplementedError("measures ask for no untrained model from elsewhere")

    def tokenizer(self) -> TextTokenizer:
        """See Subject. Raises as `load`."""
        return load_external_tokenizer(fetch(self.config, self.version))


def _placed(model: BMojoLM, on_gpu: bool) -> NativeModel:
    return NativeModel(model.to(device.pick(on_gpu)).eval())

"""The `export` stage: a trained model as a directory for other programs, registered in MLflow where asked."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from data.config import BytesSource
from pipelines.engine.stage import Stage, StageContext, StageInputs, StageNode, StageOutput
from pipelines.errors import FieldError
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.export.config import ExportFormat, ExportStageConfig
from pipelines.stages.export.directory import export_model
from pipelines.stages.models import load_model, load_tokenizer_of
from pipelines.stages.tasks import run_tasks
from pipelines.stages.train.stage import TrainStage
from pipelines.storage.artifact import ArtifactDir


class ExportOutput(StageOutput):
    """The exported model."""

    directory: str = Field(description="Folder with the model, in this artifact.")
    num_bytes: int
    registered_as: str | None = Field(description="Name of the registered model in MLflow; null: not registered.")


@dataclass(frozen=True)
class ExportInputs(StageInputs):
    """Inputs of an `export` stage. `evaluated`: evaluations of the model whose gates must be open before it starts."""

    trained: StageNode[TrainStage]
    evaluated: tuple[StageNode[EvaluateStage], ...] = ()


class ExportStage(Stage[ExportStageConfig, ExportInputs, ExportOutput]):
    """Converts in one Ray task, on a machine with memory for the model; starts again after a crash."""

    code_version = 1

    def check(self, name: str, config: ExportStageConfig, inputs: ExportInputs) -> None:
        """Refuse a model without a tokenizer, which the exported folder would hold; and evaluations of another one."""
        for evaluated in inputs.evaluated:
            model = evaluated.inputs.trained
            if model is None or model.name != inputs.trained.name:
                raise FieldError(
                    ("stages", name, "needs"),
                    f"has {evaluated.name!r}, which does not evaluate the model of {inputs.trained.name!r}. Name an "
                    "evaluation of this model, or none.",
                )
        tokens = inputs.trained.inputs.tokens[0]
        if tokens.inputs.tokenizer is None and not isinstance(tokens.config.source, BytesSource):
            raise FieldError(
                ("stages", name, "needs"),
                f"the model of {inputs.trained.name!r} is trained on token ids that are no text, and format "
                f"{config.format!r} needs a tokenizer. Remove this stage: the model is in the artifact of "
                f"{inputs.trained.name!r}.",
            )

    def run(self, config: ExportStageConfig, inputs: ExportInputs, context: StageContext) -> ExportOutput:
        """Export the trained model."""
        trained = inputs.trained
        call = (trained.artifact, trained.output.model, trained.output.tokenizer, context.artifact, config.format)
        (num_bytes,) = run_tasks(export_trained, [call], config.resources)
        if config.register_as is None:
            context.journal.log_artifact(f"{config.format}/config.json")
        else:
            tags = {"format": config.format, "train_stage": trained.name, "train_fingerprint": trained.fingerprint}
            context.journal.log_model(config.register_as, config.format, tags)
        return ExportOutput(directory=config.format, num_bytes=num_bytes, registered_as=config.register_as)


def export_trained(
    trained: ArtifactDir, model_path: str, tokenizer_reference: str | None, artifact: ArtifactDir, to: ExportFormat
) -> int:
    """Export a train stage's model into `artifact`, in a folder named after the format. Returns its bytes."""
    artifact.delete(to)  # of an attempt that died
    model = load_model(trained, model_path)
    tokenizer = load_tokenizer_of(trained, tokenizer_reference)
    num_bytes = export_model(model, tokenizer, artifact.local / to, to)
    artifact.publish(to)
    return num_bytes

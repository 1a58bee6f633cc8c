"""The `export` stage: a trained model as a directory for other programs, registered in MLflow where asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from pipelines.engine.stage import StageContext, StageOutput
from pipelines.stages.export.config import ExportFormat, ExportStageConfig

if TYPE_CHECKING:
    from pipelines.storage.artifact import ArtifactDir


class ExportOutput(StageOutput):
    """The exported model."""

    directory: str = Field(description="Folder with the model, in this artifact.")
    num_bytes: int
    registered_as: str | None = Field(description="Name of the registered model in MLflow; null: not registered.")


class ExportStage:
    """Converts in one Ray task, where there is memory for the model; begun anew after a crash."""

    kind: ClassVar[str] = "export"
    code_version: ClassVar[int] = 1
    output_type: ClassVar[type[StageOutput]] = ExportOutput

    def content_identity(self, config: ExportStageConfig) -> None:
        """All it reads are other stages' artifacts."""

    def run(self, config: ExportStageConfig, context: StageContext) -> ExportOutput:
        """Export the train stage it needs."""
        from pipelines.stages.tasks import run_tasks

        (trained,) = context.inputs_of("train")
        facts: Any = trained.output
        call = (trained.artifact, facts.model, facts.tokenizer, context.artifact, config.format)
        (num_bytes,) = run_tasks(export_trained, [call], config.resources)
        if config.register_as is None:
            context.journal.log_artifact(f"{config.format}/config.json")
        else:
            tags = {"format": config.format, "train_stage": trained.name, "train_fingerprint": trained.fingerprint}
            context.journal.log_model(config.register_as, config.format, tags)
        return ExportOutput(directory=config.format, num_bytes=num_bytes, registered_as=config.register_as)


def export_trained(
    trained: ArtifactDir, model_path: str, tokenizer_reference: str, artifact: ArtifactDir, to: ExportFormat
) -> int:
    """Export a train stage's model into `artifact`, in a folder named after the format. Returns its bytes."""
    from pipelines.stages.export.directory import export_model
    from pipelines.stages.models import load_model, load_tokenizer_of

    artifact.delete(to)  # of an attempt that died
    model = load_model(trained, model_path)
    tokenizer = load_tokenizer_of(trained, tokenizer_reference)
    num_bytes = export_model(model, tokenizer, artifact.local / to, to)
    artifact.publish(to)
    return num_bytes

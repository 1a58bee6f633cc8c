"""The `evaluate` stage: how well a trained model predicts the validation split, near and far, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field

from pipelines.engine.stage import ProgressMetrics, Stage, StageContext, StageInputs, StageNode, StageOutput
from pipelines.errors import FieldError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.section import EvaluatedModel
from pipelines.stages.numbers import optional, perplexity
from pipelines.stages.sections import Section
from pipelines.stages.tokenize.stage import TokenizeStage
from pipelines.stages.train.stage import TrainStage, read_history
from pipelines.storage.artifact import ArtifactDir


class SampleText(StageOutput):
    """A prompt and what the model made of it."""

    prompt: str
    text: str


class EvaluateOutput(StageOutput):
    """The figures of one model. Losses are nats per token, positions and lengths tokens.

    Of token ids that are no text there are no bytes, and no samples.
    """

    precision: Literal["fp32", "bf16"] = Field("fp32", description="What the model computed in.")
    seq_len: int
    num_documents: int
    num_tokens: int
    num_bytes: int | None
    loss: float
    perplexity: float
    bits_per_byte: float | None
    untrained_bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    accuracy: float | None = Field(
        description="Share of the answers of a synthetic task that are the model's likeliest token; null: no task."
    )
    chance_accuracy: float | None = Field(description="The same of a guess among the possible answers.")
    context_tokens: int = Field(
        description="Length up to which loss by position was measured; 0: no document is long enough."
    )
    num_windows: int
    position_bin_ends: tuple[int, ...]
    position_loss: tuple[float, ...]
    samples: tuple[SampleText, ...]

    def figures(self) -> dict[str, float]:
        """Those of the whole validation split, and the baselines'."""
        figures = {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/untrained_bits_per_byte": self.untrained_bits_per_byte,
            "eval/gzip_bits_per_byte": self.gzip_bits_per_byte,
            "eval/accuracy": self.accuracy,
            "eval/chance_accuracy": self.chance_accuracy,
        }
        return {name: value for name, value in figures.items() if value is not None}

    def report_cells(self) -> dict[str, str]:
        """Those of the whole validation split, and the baselines', for the table of a report."""
        cells = {
            "loss (nats/token)": f"{self.loss:.4f}",
            "perplexity": f"{self.perplexity:.2f}",
            "bits per byte": optional(self.bits_per_byte, "{:.3f}"),
            "untrained": optional(self.untrained_bits_per_byte, "{:.3f}"),
            "gzip -9": optional(self.gzip_bits_per_byte, "{:.3f}"),
        }
        if self.precision != "fp32":
            cells["precision"] = self.precision
        if self.accuracy is not None:
            cells["accuracy"] = f"{self.accuracy:.1%} (chance {self.chance_accuracy:.1%})"
        return cells

    @property
    def position_perplexity(self) -> list[tuple[int, float]]:
        """Perplexity in each bin of positions, by the end of the bin."""
        bins = zip(self.position_bin_ends, self.position_loss, strict=True)
        return [(end, perplexity(loss)) for end, loss in bins]


@dataclass(frozen=True)
class EvaluateInputs(StageInputs):
    """Inputs of an `evaluate` stage: a model, and the validation split to evaluate it on."""

    trained: StageNode[TrainStage]
    tokens: StageNode[TokenizeStage]


class EvaluateStage(Stage[EvaluateStageConfig, EvaluateInputs, EvaluateOutput]):
    """Spread over Ray actors; nothing is kept between attempts, since it takes seconds to minutes."""

    code_version = 2
    progress = ProgressMetrics("evaluate/tasks_total", {})

    def check(self, name: str, config: EvaluateStageConfig, inputs: EvaluateInputs) -> None:
        """Refuse a tokenize stage without a validation split."""
        if not inputs.tokens.config.validation_fraction:
            raise FieldError(
                ("stages", inputs.tokens.name, "validation_fraction"),
                f"is 0, so {name!r} has nothing to evaluate on. Set it above 0 (0.01 keeps a hundredth of the "
                "documents).",
            )

    def run(self, config: EvaluateStageConfig, inputs: EvaluateInputs, context: StageContext) -> EvaluateOutput:
        """Evaluate the trained model on the validation split."""
        from pipelines.stages.evaluate.evaluation import evaluate

        trained, tokens = inputs.trained, inputs.tokens
        assert tokens.output.valid_sha256 is not None, "check() refuses a tokenize stage without a validation split"
        context.journal.log_dataset(tokens.name, tokens.output.valid_sha256, tokens.artifact.url, context="eval")
        output = evaluate(config, trained, tokens, context.journal)
        context.artifact.write_json("results.json", output.model_dump(mode="json"))
        context.journal.log_metrics(0, output.figures())
        context.journal.log_artifact("results.json")
        return output

    def section(self, node: StageNode[Self]) -> Section:
        """The model's figures, curves and samples."""
        trained, tokens = node.inputs.trained, node.inputs.tokens
        return EvaluatedModel(
            name=trained.name,
            pattern=trained.config.model.pattern,
            training=trained.output,
            evaluation=node.output,
            history=read_history(trained.artifact),
            data=[f"{tokens.name}: {tokens.output.summary()}."],
        ).section()

    def headline(self, config: EvaluateStageConfig, output: EvaluateOutput, artifact: ArtifactDir) -> str:
        """The loss in its three units, beside the baselines; of a task also the answers that are right."""
        baselines = {"gzip -9": output.gzip_bits_per_byte, "untrained": output.untrained_bits_per_byte}
        compared = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items() if value is not None)
        first = ""
        if output.accuracy is not None:
            first = f"[bold]{output.accuracy:.1%} of the answers right[/] (chance {output.chance_accuracy:.1%}), "
        if output.bits_per_byte is not None:
            first = f"[bold]{output.bits_per_byte:.3f} bits per byte[/]{f' ({compared})' if compared else ''}, "
        return (
            f"{first}loss {output.loss:.4f} nats per token, perplexity {output.perplexity:.2f}, "
            f"on {output.num_documents} documents"
        )

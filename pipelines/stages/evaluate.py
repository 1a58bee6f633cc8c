"""The `evaluate` stage: how well a trained model predicts the validation split, near and far, and what it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipelines.evaluation.config import EvaluateStageConfig
from pipelines.stages.base import StageConfig, StageContext, StageInput, StageOutput

if TYPE_CHECKING:
    import numpy as np

    from bmojo import BMojoLM
    from data.tokenizer import Tokenizer
    from pipelines.engine.artifact import ArtifactDir
    from pipelines.evaluation.scoring import PositionCurve
    from pipelines.tracking.remote import RemoteJournal


class SampleText(StageOutput):
    """A prompt and what the model made of it."""

    prompt: str
    text: str


class EvaluateOutput(StageOutput):
    """The figures of one model. Losses are nats a token, positions and lengths tokens."""

    seq_len: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    untrained_bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    context_tokens: int = Field(
        description="Length up to which loss by position was measured; 0: no document is long enough."
    )
    num_windows: int
    position_bin_ends: tuple[int, ...]
    position_loss: tuple[float, ...]
    samples: tuple[SampleText, ...]


class EvaluateStage:
    """Scores in one Ray task; nothing is kept between attempts, since it takes seconds to minutes."""

    kind: ClassVar[str] = "evaluate"
    code_version: ClassVar[int] = 1
    config_type: ClassVar[type[StageConfig]] = EvaluateStageConfig
    output_type: ClassVar[type[StageOutput]] = EvaluateOutput

    def content_identity(self, config: EvaluateStageConfig) -> None:
        """All it reads are other stages' artifacts."""

    def run(self, config: EvaluateStageConfig, context: StageContext) -> EvaluateOutput:
        """Evaluate the train stage it needs on the tokenize stage it needs."""
        import ray

        from pipelines.tracking.remote import remote_journal

        (trained,) = context.inputs_of("train")
        (tokens,) = context.inputs_of("tokenize")
        resources = config.resources
        task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(_evaluate)
        with remote_journal(context.journal) as journal:
            output: EvaluateOutput = ray.get(task.remote(config, trained, tokens, context.artifact, journal))
        context.artifact.write_json("results.json", output.model_dump(mode="json"))
        context.journal.log_metrics(0, _headline_metrics(output))
        context.journal.log_artifact("results.json")
        return output


def _headline_metrics(output: EvaluateOutput) -> dict[str, float]:
    figures = {
        "eval/loss": output.loss,
        "eval/perplexity": output.perplexity,
        "eval/bits_per_byte": output.bits_per_byte,
        "eval/untrained_bits_per_byte": output.untrained_bits_per_byte,
        "eval/gzip_bits_per_byte": output.gzip_bits_per_byte,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _evaluate(
    config: EvaluateStageConfig, trained: StageInput, tokens: StageInput, artifact: ArtifactDir, journal: RemoteJournal
) -> EvaluateOutput:
    """Runs as a Ray task."""
    import math

    import torch

    from bmojo import BMojoLM
    from bmojo.checkpoint_io import load_pretrained
    from data.shards import read_token_batches, read_token_documents
    from data.tokenizer import load_tokenizer
    from pipelines.evaluation import scoring

    torch.set_num_threads(max(1, math.ceil(config.resources.cpus_per_worker)))
    device = torch.device("cuda" if config.resources.gpus_per_worker else "cpu")
    model = load_pretrained(trained.artifact.fetch("model")).to(device).eval()
    shards = tokens.artifact.fetch()
    tokenizer = load_tokenizer(shards / "tokenizer")
    seq_len: int = tokens.output.seq_len  # type: ignore[attr-defined]

    batches = list(scoring.take_tokens(read_token_batches(shards, "valid", config.batch_size), config.max_tokens))
    total = sum(int((batch.targets_bt >= 0).sum()) for batch in batches) * (2 if config.baselines else 1)
    journal.log_metrics(0, {"evaluate/tokens_total": total})

    def tell(num_tokens: int) -> None:
        journal.log_metrics(num_tokens, {"evaluate/tokens_done": num_tokens})

    score = scoring.score_batches(model, batches, tokenizer.token_num_bytes, tell)
    documents = list(read_token_documents(shards, "valid"))
    untrained_bits_per_byte = gzip_bits_per_byte = None
    if config.baselines:
        untrained = BMojoLM(model.config)
        untrained.init_weights(seed=0)
        untrained_score = scoring.score_batches(
            untrained.to(device).eval(), batches, tokenizer.token_num_bytes, lambda done: tell(score.num_tokens + done)
        )
        untrained_bits_per_byte = untrained_score.bits_per_byte
        gzip_bits_per_byte = scoring.gzip_bits_per_byte(tokenizer.decode(document) for document in documents)

    curve, context_tokens = _position_curve(config, model, documents, tokenizer.eod_id, seq_len)
    samples = tuple(
        SampleText(prompt=prompt, text=_sample(config, model, tokenizer, prompt)) for prompt in config.sample.prompts
    )
    return EvaluateOutput(
        seq_len=seq_len,
        num_documents=len(documents),
        num_tokens=score.num_tokens,
        num_bytes=score.num_bytes,
        loss=score.loss,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        untrained_bits_per_byte=untrained_bits_per_byte,
        gzip_bits_per_byte=gzip_bits_per_byte,
        context_tokens=context_tokens,
        num_windows=curve.num_windows if curve else 0,
        position_bin_ends=curve.bin_ends if curve else (),
        position_loss=curve.loss if curve else (),
        samples=samples,
    )


def _position_curve(
    config: EvaluateStageConfig, model: BMojoLM, documents: list[np.ndarray], eod_id: int, seq_len: int
) -> tuple[PositionCurve | None, int]:
    """The curve up to `context_multiple` training lengths, or as far as there are long enough documents."""
    import numpy as np

    from pipelines.evaluation import scoring

    documents = [np.concatenate(([eod_id], document)) for document in documents]  # as each began in training

    for multiple in range(config.context_multiple, 0, -1):
        windows = scoring.long_windows(documents, multiple * seq_len, config.context_windows)
        if windows:
            bins = scoring.position_bins(seq_len, multiple * seq_len)
            return scoring.score_by_position(model, windows, bins), multiple * seq_len
    return None, 0


def _sample(config: EvaluateStageConfig, model: BMojoLM, tokenizer: Tokenizer, prompt: str) -> str:
    from pipelines.evaluation.sampling import continue_text

    sample = config.sample
    pieces = continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        seed=sample.seed,
    )
    return "".join(pieces)

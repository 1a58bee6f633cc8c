"""The `tokenizer` stage: a byte-level BPE tokenizer, trained on the source or loaded."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel, Field

from data.config import TokenizerFields
from data.paths import expanded
from data.sampling import sample_texts
from data.sources import content_identity, local_paths, with_absolute_paths
from pipelines.engine.stage import Stage, StageConfig, StageContext, StageInputs, StageOutput
from pipelines.stages.tasks import require_planned_content, run_tasks, user_errors
from pipelines.storage.artifact import ArtifactDir

TOKENIZER_FOLDER = "tokenizer"


class TokenizerStageConfig(StageConfig, TokenizerFields):
    """Train a tokenizer on text, or take one that exists."""

    kind: Literal["tokenizer"]


class TokenizerOutput(StageOutput):
    """Facts about the tokenizer in the artifact's folder `tokenizer`."""

    vocab_size: int
    eod_id: int = Field(description="Id of the end-of-document token.")
    end_of_document: str
    backend: str = Field(description="Library that encodes: tiktoken, or tokenizers where ids might differ.")
    sha256: str


class TokenizerStage(Stage[TokenizerStageConfig, StageInputs, TokenizerOutput]):
    """Trains in one Ray task, which uses all cores it finds; nothing is kept between attempts."""

    code_version = 2

    def content_identity(self, config: TokenizerStageConfig) -> str:
        """Digest of the text to train on, or of the tokenizer to load. Raises UserError: that is missing or invalid."""
        from data.lossless import check_name_is_no_text
        from data.tokenizer import PATTERN, load_tokenizer

        with user_errors():
            if config.source is not None:
                check_name_is_no_text(config.end_of_document, PATTERN)
                return content_identity(config.source)
            assert config.load is not None
            return load_tokenizer(config.load, config.end_of_document).sha256

    def local_paths(self, config: TokenizerStageConfig) -> tuple[str, ...]:
        """The text, or the tokenizer to load."""
        return (str(config.load),) if config.source is None else local_paths(config.source)

    def run(self, config: TokenizerStageConfig, inputs: StageInputs, context: StageContext) -> TokenizerOutput:
        """Make the tokenizer and put it into the artifact. Raises UserError: the text or the tokenizer is invalid."""
        if config.source is not None:
            source = with_absolute_paths(config.source)
            config = config.model_copy(update={"source": source})
            digest = self.content_identity(config)
            require_planned_content(context, digest)
            context.journal.log_dataset(context.name, digest, describe_source(source), context="tokenizer")
        else:
            config = config.model_copy(update={"load": str(expanded(str(config.load)).absolute())})
        started = time.monotonic()
        one_task = config.resources.model_copy(update={"num_workers": 1})
        (output,) = run_tasks(_make_tokenizer, [(config, context.artifact)], one_task)
        require_planned_content(context, output.sha256 if config.source is None else self.content_identity(config))
        context.journal.log_metrics(
            0, {"tokenizer/vocab_size": output.vocab_size, "tokenizer/train_time_s": time.monotonic() - started}
        )
        context.journal.log_artifact(TOKENIZER_FOLDER)
        return output

    def headline(self, config: TokenizerStageConfig, output: TokenizerOutput, artifact: ArtifactDir) -> str | None:
        """A note if the text gave fewer ids than asked for."""
        if config.load is not None or output.vocab_size >= config.vocab_size:
            return None
        return (
            f"[yellow]note:[/] {output.vocab_size:,} token ids, not {config.vocab_size:,} (vocab_size): the text has "
            "no more pairs to merge"
        )


def describe_source(source: BaseModel) -> str:
    """A source in one line, for the tracking server."""
    fields = source.model_dump(exclude_defaults=True)
    return " ".join(f"{name}={value}" if name != "kind" else str(value) for name, value in fields.items())


def _make_tokenizer(config: TokenizerStageConfig, artifact: ArtifactDir) -> TokenizerOutput:
    """Runs as a Ray task. Raises DataError."""
    from data.tokenizer import load_tokenizer, train_tokenizer

    if config.source is not None:
        tokenizer = train_tokenizer(sample_texts(config.source, config.sample_bytes), config)
    else:
        assert config.load is not None
        tokenizer = load_tokenizer(config.load, config.end_of_document)
    tokenizer.save(artifact.local / TOKENIZER_FOLDER)
    artifact.publish(TOKENIZER_FOLDER)
    return TokenizerOutput(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        end_of_document=tokenizer.end_of_document,
        backend=tokenizer.backend,
        sha256=tokenizer.sha256,
    )

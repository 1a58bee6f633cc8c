"""Which samples, documents and bytes of which files an optimizer step was trained on: from indexes alone."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from base.errors import UserError
from pipelines.api.finding import needs_of, require_kind
from pipelines.api.tokens import tokens_artifact
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.stages.tokenize.stage import TokenizeStage
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.data import TokenSource, mixture_of
from pipelines.stages.train.layout import complete_steps
from pipelines.stages.train.stage import TrainStage


class DocumentPart(Facts):
    """The part of a document that stands in a sample. Bytes are those of the whole document in its file."""

    document: str
    first_byte: int | None
    end_byte: int | None
    first_token: int
    num_tokens: int


class StepSample(Facts):
    """One sequence of a step."""

    source: str  # name of the tokenize stage
    sample: int  # its number in the training split
    shard: str
    in_shard: int
    documents: tuple[DocumentPart, ...]


class StepLineage(Facts):
    """The global batch of an optimizer step."""

    run: str
    stage: str
    step: int  # from 1, as the curves count
    samples: tuple[StepSample, ...]


def lineage(run: Run, stage: str, step: int) -> StepLineage:
    """The samples of a step (from 1) of a `train` stage, finished or not; in the order in which workers share them.

    Raises: UserError: it is no train stage, has no such step, or the tokens it reads are not there.
    """
    from data.lineage import documents_of
    from data.streaming import StreamOrder, TokenStream, Worker
    from pipelines.stages.tokenize.reading import token_split

    info = run.info()
    stages = run.stored_state().stages
    require_kind(run, stage, TrainStage.kind)
    try:
        config = TrainStageConfig.model_validate(info.config["stages"][stage])
    except ValidationError as error:
        raise UserError(f"The settings of stage {stage} are of another version of this program: {error}") from error
    sources = [name for name in needs_of(info, stage) if stages[name].kind == TokenizeStage.kind]
    splits = [token_split(tokens_artifact(run, name), "train") for name in sources]
    num_steps = config.num_steps(splits[0].index.format.seq_len)
    if not 1 <= step <= num_steps:
        raise UserError(f"Stage {stage} has no step {step}: its steps are 1 to {num_steps}.")
    counted = [
        TokenSource(name, tokens_artifact(run, name), split.index.counts.num_samples, has_validation=False)
        for name, split in zip(sources, splits, strict=True)
    ]
    first_position = _first_position(run, config, needs_of(info, stage))
    batches = config.batches(first_position)
    order = StreamOrder(config.seed, num_paths=config.data.paths, block_samples=config.data.shuffle_block_samples)
    with TokenStream(
        splits,
        micro_batch_size=batches.common_divisor,
        global_batch_size=config.global_batch_size,
        order=order,
        worker=Worker(),
        batches=batches,
        mixture=mixture_of(config, counted, num_steps, first_position),
    ) as stream:
        numbered = [(place, stream.sample_number(place)) for place in stream.places(step - 1)]
    samples = []
    for place, number in numbered:
        index = splits[place.source].index
        samples.append(
            StepSample(
                source=sources[place.source],
                sample=number,
                shard=index.entry(place.shard).name,
                in_shard=place.sample,
                documents=tuple(
                    DocumentPart(
                        document=part.id,
                        first_byte=part.start,
                        end_byte=part.end,
                        first_token=part.tokens.start,
                        num_tokens=len(part.targets),
                    )
                    for part in documents_of(splits[place.source], number)
                ),
            )
        )
    return StepLineage(run=run.run_id, stage=stage, step=step, samples=tuple(samples))


def _first_position(run: Run, config: TrainStageConfig, needs: Sequence[str]) -> int:
    """Where in the data its first step begins: above 0 if it goes on where another stage's checkpoint stood."""
    if not config.start.continue_data:
        return 0
    from pipelines.stages.train.checkpoint import read_state

    stages = run.stored_state().stages
    (initial,) = [name for name in needs if stages[name].kind == TrainStage.kind]
    artifact = run.artifact_of(stages[initial])
    steps = [] if artifact is None else complete_steps(artifact)
    step = config.start.step or max(steps, default=0)
    if artifact is None or step not in steps:
        raise UserError(
            f"Stage {initial}, in whose data this stage goes on, has no checkpoint of step {step} any more."
        )
    return int(read_state(artifact, step).data["num_samples"])

"""`bmojo generate`: text from a trained model."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from base.errors import UserError
from pipelines.cli.console import RunArgument, StorageOption
from pipelines.engine.records import FinishedStage, read_record
from pipelines.engine.runs import Run, find_run
from pipelines.stages.models import load_model, load_tokenizer_of, placed_for_decoding
from pipelines.stages.train.layout import complete_steps
from pipelines.stages.train.stage import TrainStage
from pipelines.storage import open_storage

if TYPE_CHECKING:
    from bmojo import BMojoLM
    from data.tokenizer import Tokenizer
    from pipelines.storage.artifact import ArtifactDir

StageOption = Annotated[
    str | None, typer.Option(help="Train stage to take the model from; needed where a run has several.")
]
StepOption = Annotated[
    int | None,
    typer.Option(help="Step of a checkpoint that `bmojo checkpoints` lists; left out: the final model."),
]


@dataclass(frozen=True)
class TrainedModel:
    """A model of a run, with its tokenizer. step: of a kept checkpoint; None: the final model."""

    run: Run
    stage: str
    model: BMojoLM
    tokenizer: Tokenizer
    step: int | None = None


def load_trained(storage: str, run: str | None, stage: str | None, step: int | None = None) -> TrainedModel:
    """Load a finished train stage's model, or that of a checkpoint which it keeps.

    Raises: UserError: there is no such run, stage or step, it is not finished, or there are several and none is named;
        or BMOJO_KERNELS asks for kernels that cannot run here.
    """
    from kernels.operator import check_request

    found = find_run(open_storage(storage), run)
    trained = {name: state for name, state in found.state().stages.items() if state.kind == TrainStage.kind}
    if stage is None and len(trained) != 1:
        raise UserError(
            f"Run {found.run_id} has {len(trained)} train stages ({', '.join(trained)}). Choose one with --stage."
        )
    name = stage or next(iter(trained))
    if name not in trained:
        raise UserError(f"Run {found.run_id} has no train stage {name!r}; it has: {', '.join(trained) or 'none'}.")
    artifact = found.artifact_of(trained[name])
    record = read_record(artifact) if artifact else None
    if artifact is None or record is None:
        raise UserError(
            f"Stage {name!r} of run {found.run_id} is {trained[name].status}, not finished. {_advice(found)}"
        )
    output = FinishedStage(artifact, record).result(TrainStage()).output
    model = _load(artifact, output.model, step).eval()
    try:
        check_request(model.embedding.weight)  # now, so that what is missing is said before any output
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(str(error)) from error
    return TrainedModel(found, name, model, load_tokenizer_of(artifact, output.tokenizer), step)


def _load(artifact: ArtifactDir, path: str, step: int | None) -> BMojoLM:
    from pipelines.stages.train.weights import load_checkpoint

    if step is None:
        return load_model(artifact, path)
    kept = complete_steps(artifact)
    if step not in kept:
        raise UserError(
            f"--step {step}: there is no checkpoint of that step; kept: {', '.join(map(str, kept)) or 'none'}. Leave "
            "--step out for the final model. keep_checkpoints and keep_every_steps of the train stage keep more."
        )
    return load_checkpoint(artifact, path, step)


def load_for_decoding(storage: str, run: str | None, stage: str | None, step: int | None = None) -> TrainedModel:
    """As load_trained, on the GPU if there is one, in the precision that is used there."""
    trained = load_trained(storage, run, stage, step)
    placed_for_decoding(trained.model)
    return trained


def _advice(run: Run) -> str:
    at = f"{run.run_id} --storage {quote(run.storage.url)}"
    holder = run.holder()
    if holder is not None:
        return f"The run is running now, by {holder}. Wait for it; bmojo status {at} shows how far it is."
    return f"Resume it: bmojo resume {at}."


def above_zero(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value} is not above 0: no token would be left to choose from.")
    return value


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


TemperatureOption = Annotated[float, typer.Option(min=0, callback=finite, help="0 always takes the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Sample from the k likeliest tokens only.")]
TopPOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, callback=above_zero, help="Sample from the likeliest with this total probability."),
]


def generate(
    run: RunArgument = None,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty: a new document.")] = "",
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate at most; the model may end the document before.")
    ] = 200,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 50,
    top_p: TopPOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    stage: StageOption = None,
    step: StepOption = None,
    storage: StorageOption = "runs",
) -> None:
    """Stream text from a trained model, token by token, to standard output."""
    from pipelines.stages.evaluate.language_model import Drawing
    from pipelines.stages.evaluate.sampling import continue_text

    trained = load_for_decoding(storage, run, stage, step)
    drawing = Drawing(tokens, temperature, top_k, top_p, seed)
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for piece in continue_text(trained.model, trained.tokenizer, prompt, drawing):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")

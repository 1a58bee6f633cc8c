"""`bmojo serve`: a trained model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.console import RunArgument, StorageOption, console
from pipelines.cli.models import StageOption, StepOption, TrainedModel, load_for_decoding

if TYPE_CHECKING:
    from pipelines.serving.states import StateStore

StatesOption = Annotated[
    Path | None,
    typer.Option(
        "--states", help="Folder of saved states; left out: bmojo/states/MODEL in $XDG_STATE_HOME or ~/.local/state."
    ),
]
ContextOption = Annotated[
    int,
    typer.Option(
        min=2, help="Room for tokens of prompt and answer in layers of full attention; other layers need none."
    ),
]


def serve(
    run: RunArgument = None,
    stage: StageOption = None,
    step: StepOption = None,
    storage: StorageOption = "runs",
    host: Annotated[
        str, typer.Option(help="Address to bind. Other than loopback, clients need the key in BMOJO_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Answers drawn at once. A token takes as long for one answer as for all of them.")
    ] = 16,
    queue_size: Annotated[int, typer.Option(min=0, help="Answers that may wait beside those; then: 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one answer may have, at most.")] = 8192,
    prompt_piece: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt read between two tokens of the answers under way.")
    ] = 128,
    context_tokens: ContextOption = 4096,
    states: StatesOption = None,
    drain_s: Annotated[int, typer.Option(min=0, help="Seconds that SIGTERM leaves to what is under way.")] = 30,
) -> None:
    """Serve a trained model: /v1/completions, /v1/chat/completions and /v1/models as OpenAI's, and /v1/states.

    Ctrl-C or SIGTERM stops it once the answers under way are complete.
    """
    from pipelines.serving.app import make_app
    from pipelines.serving.engine import Engine, Limits
    from pipelines.serving.guard import key_for
    from pipelines.serving.metrics import Metrics
    from pipelines.serving.server import bound_socket, url_of
    from pipelines.serving.server import serve as run_server
    from pipelines.serving.service import Service

    key = key_for(host)
    with bound_socket(host, port) as bound:
        with console.status("Loading the model ..."):
            trained = load_for_decoding(storage, run, stage, step)
            store = state_store(trained, states)
            limits = Limits(batch_size, queue_size, prompt_piece, context_tokens)
            metrics = Metrics()
            engine = Engine(trained.model, trained.tokenizer, limits, metrics)
        metrics.watch(engine.load)
        service = Service(model_name(trained), engine, trained.tokenizer, store, metrics, max_tokens)

        def announce() -> None:
            console.print(f"Serving {model_name(trained)} on {url_of(bound)} (Ctrl-C stops it)", soft_wrap=True)
            console.print(f"Saved states are in {store.folder}", soft_wrap=True, markup=False)

        run_server(make_app(service, host, key), bound, drain_s, announce)
    console.print("Stopped.")


def model_name(trained: TrainedModel) -> str:
    """What clients call the model."""
    step = "" if trained.step is None else f"/step-{trained.step}"
    return f"{trained.run.run_id}/{trained.stage}{step}"


def state_store(trained: TrainedModel, folder: Path | None) -> StateStore:
    """Where states of this model are kept."""
    from pipelines.serving.context import model_digest
    from pipelines.serving.states import StateStore

    if folder is None:
        home = os.environ.get("XDG_STATE_HOME")
        parent = Path(home) if home else Path.home() / ".local" / "state"
        folder = parent / "bmojo" / "states" / model_name(trained).replace("/", "-")
    digest = model_digest(trained.model, trained.tokenizer.sha256)
    store = StateStore(folder, model_name(trained), digest, trained.model.init_state(1))
    store.remove_unfinished()
    return store

"""`bmojo remember`, `bmojo ask` and `bmojo store`: documents that a model reads again while it decodes."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.table import Table

from base.errors import UserError
from data.errors import DataError
from pipelines.cli.console import (
    JsonOption,
    OverridableCommand,
    StorageOption,
    console,
    error_console,
    only_json_on_stdout,
    print_json,
)
from pipelines.cli.models import (
    StageOption,
    StepOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    above_zero,
    load_for_decoding,
    placed_for_decoding,
)
from pipelines.cli.progress import delivery_progress
from pipelines.cli.serve import model_name
from pipelines.memory.store import DocumentStore, ModelIdentity, ModelSource
from pipelines.storage import open_storage

if TYPE_CHECKING:
    from bmojo import BMojoLM
    from data.tokenizer import Tokenizer

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder or URL of the store, such as notes.store or s3://bucket/notes.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Folder written by `bmojo export`, or a run: its id, the beginning of one, or a name.",
        show_default=False,
    ),
]  # fmt: skip
Begin = Literal["fresh", "nearest", "weighted", "decayed"]
"""Names of bmojo.long_term.Composition, which takes seconds to import."""

app = typer.Typer(name="store", no_args_is_help=True, help="Look after a store that `bmojo remember` made.")


class Loaded(NamedTuple):
    """A model with its tokenizer, and what it is called in a store."""

    model: BMojoLM
    tokenizer: Tokenizer
    identity: ModelIdentity


def remember(
    store: StoreArgument,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="UTF-8 text files, or folders of them.", show_default=False)
    ],
    model: ModelOption = None,
    stage: StageOption = None,
    step: StepOption = None,
    part_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cut longer files into documents of this many tokens, each with eidetic tokens of its own; "
            "left out: each file is one document.",
        ),
    ] = None,
    storage: StorageOption = "runs",
) -> None:  # fmt: skip
    """Let a model read files, and keep what it remembers of them for `bmojo ask`.

    Kept are, of each document, the decoding state and the tokens that the eidetic layers chose: as many bytes however
    long it is. What is in the store already is skipped, so the same command resumes after a kill.

    Example: `bmojo remember notes.store notes/ --model quickstart`
    """
    from pipelines.memory.remembering import check_model, files_of, remember_files

    place = open_storage(store)
    found = files_of(files)
    with error_console.status("Loading the model ..."):
        loaded = _load(place.url, model, stage, step, storage)
        check_model(loaded.model)
        opened = DocumentStore.create(place, loaded.identity)
    with delivery_progress(console, "remembering (bytes)") as update:
        result = remember_files(opened, loaded.model, loaded.tokenizer, found, part_tokens, update)
    for empty in result.empty:
        error_console.print(f"warning: {empty} holds no text.", markup=False, soft_wrap=True)
    skipped = f", {result.num_skipped} were there already" if result.num_skipped else ""
    console.print(
        f"Remembered {result.num_documents} documents ({result.num_tokens:,} tokens) in {result.num_bytes / 1e6:.1f} MB"
        f"{skipped}. Ask: bmojo ask {store} --query TEXT",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def ask(
    store: StoreArgument,
    query: Annotated[str, typer.Option(help="Text that the answer goes on with.", show_default=False)],
    documents: Annotated[
        int, typer.Option(min=1, help="Documents that a layer reads at each token: those nearest to its query.")
    ] = 4,
    begin: Annotated[
        Begin,
        typer.Option(
            help="State to begin with. fresh: an empty one. nearest: the nearest document's. weighted: of the nearest "
            "documents, weighted by how near they are. decayed: as if they had been read one after the other."
        ),
    ] = "fresh",
    tau: Annotated[
        float | None,
        typer.Option(
            min=0, callback=above_zero,
            help="Forgetting time, in tokens remembered since: old documents count less by exp(-age / tau). Left out: "
            "the model's innovation_tau, if it has one.",
        ),
    ] = None,
    show_sources: Annotated[bool, typer.Option(help="After the answer, show which documents were read.")] = False,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate at most; the model may end the document before.")
    ] = 200,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 50,
    top_p: TopPOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    model: ModelOption = None,
    stage: StageOption = None,
    step: StepOption = None,
    storage: StorageOption = "runs",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Go on with a text while reading the documents of a store: each eidetic layer, at each token, those it is nearest
    to.

    The model is the one that remembered the documents; --model says where it is now, if it has moved.

    Example: `bmojo ask notes.store --query "The key is under" --show-sources`
    """
    from pipelines.memory.asking import StoredMemory
    from pipelines.memory.asking import ask as ask_store
    from pipelines.stages.evaluate.language_model import Drawing

    if as_json:
        only_json_on_stdout()
    opened = DocumentStore.open(open_storage(store))
    with error_console.status("Loading the model and the documents ..."):
        loaded = _load(opened.storage.url, model, stage, step, storage, opened.manifest.identity.source)
        opened.check_model(loaded.identity)
        forgetting = tau if tau is not None else loaded.model.config.innovation_tau
        memory = StoredMemory(opened, loaded.model, documents, forgetting)
        drawing = Drawing(tokens, temperature, top_k, top_p, seed)
        answer = ask_store(loaded.model, loaded.tokenizer, memory, query, drawing, begin, documents)
    if as_json:
        text = "".join(answer.pieces())
        sources = [
            {"name": one.record.name, "id": one.record.id, "attention": one.attention, "in_state": one.in_state}
            for one in answer.sources()
        ]
        print_json({"query": query, "answer": text, "sources": sources})
        return
    for piece in (query, *answer.pieces()):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if show_sources:
        _print_sources(answer.sources())


@app.command("list", cls=OverridableCommand)
def list_documents(store: StoreArgument, as_json: JsonOption = False) -> None:
    """List the documents of a store, the oldest first."""
    opened = DocumentStore.open(open_storage(store))
    records = opened.records()
    if as_json:
        print_json(records)
        return
    identity = opened.manifest.identity
    console.print(
        f"Model {identity.name} ({identity.pattern}, digest {identity.digest[:12]})", markup=False, soft_wrap=True
    )
    table = Table(box=None, pad_edge=False)
    for column in ("ID", "TOKENS", "KB", "REMEMBERED", "NAME"):
        table.add_column(column, justify="right" if column in ("TOKENS", "KB") else "left", overflow="fold")
    for record in records:
        at = datetime.fromtimestamp(record.remembered_at).strftime("%Y-%m-%d %H:%M")
        table.add_row(record.id[:12], f"{record.num_tokens:,}", f"{record.num_bytes / 1e3:,.0f}", at, record.name)
    console.print(table)
    total_mb = sum(record.num_bytes for record in records) / 1e6
    console.print(f"{len(records)} documents, {total_mb:.1f} MB.")


@app.command(cls=OverridableCommand)
def forget(
    store: StoreArgument,
    documents: Annotated[
        list[str], typer.Argument(metavar="DOCUMENT...", help="Names or ids as `bmojo store list` shows them.")
    ],
) -> None:
    """Remove documents from a store."""
    opened = DocumentStore.open(open_storage(store))
    for record in opened.named(documents):
        opened.remove(record)
        console.print(f"Forgot {record.name} ({record.id[:12]}).", markup=False, soft_wrap=True)


@app.command(cls=OverridableCommand)
def verify(
    store: StoreArgument,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what is damaged or half written; remember the files again then.")
    ] = False,
) -> None:
    """Read a store whole, and compare every file with its digest. Exit code 1 if something is damaged and stays."""
    opened = DocumentStore.open(open_storage(store))
    with delivery_progress(console, "checking (documents)") as update:
        problems = opened.verify(update)
    for problem in problems:
        error_console.print(f"{problem.name or problem.id[:12]}: {problem.problem}", markup=False, soft_wrap=True)
    if not problems:
        console.print(f"All {len(opened.records())} documents are as they were written.")
    elif remove:
        opened.remove_damaged(problems)
        console.print(f"Removed {len({problem.id for problem in problems})} damaged or half-written documents.")
    else:
        raise typer.Exit(1)


def _load(
    store_url: str, model: str | None, stage: str | None, step: int | None, storage: str,
    known: ModelSource | None = None,
) -> Loaded:  # fmt: skip
    """The model that is named, or else the one known to the store."""
    if model is None:
        if known is None:
            raise UserError(f"{store_url}: name the model with --model: a folder of `bmojo export`, or a run.")
        source = known
    elif (Path(model) / "config.json").is_file():
        source = ModelSource(model=str(Path(model).resolve()))
    else:
        source = ModelSource(model=model, storage=open_storage(storage).url, stage=stage, step=step)
    return _of_export(source) if source.storage is None else _of_run(source, source.storage)


def _of_run(source: ModelSource, storage: str) -> Loaded:
    trained = load_for_decoding(storage, source.model, source.stage, source.step)
    exact = source.model_copy(update={"model": trained.run.run_id, "stage": trained.stage})
    return _loaded(trained.model, trained.tokenizer, model_name(trained), exact)


def _of_export(source: ModelSource) -> Loaded:
    from bmojo.hf import import_from_hf
    from data.tokenizer import load_tokenizer

    try:
        model, tokenizer = import_from_hf(source.model).eval(), load_tokenizer(source.model)
    except (FileNotFoundError, ValueError, DataError) as error:
        raise UserError(f"--model {source.model}: {error}") from error
    return _loaded(placed_for_decoding(model), tokenizer, Path(source.model).name, source)


def _loaded(model: BMojoLM, tokenizer: Tokenizer, name: str, source: ModelSource) -> Loaded:
    from pipelines.serving.context import model_digest

    identity = ModelIdentity(
        name=name, digest=model_digest(model, tokenizer.sha256), tokenizer_sha256=tokenizer.sha256,
        pattern=model.config.pattern, source=source,
    )  # fmt: skip
    return Loaded(model, tokenizer, identity)


def _print_sources(sources: list[Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("ATTENTION", "IN STATE", "TOKENS", "DOCUMENT"):
        table.add_column(column, justify="left" if column == "DOCUMENT" else "right", overflow="fold")
    for one in sources:
        in_state = f"{one.in_state:.2f}" if one.in_state else ""
        table.add_row(f"{100 * one.attention:.1f} %", in_state, f"{one.record.num_tokens:,}", one.record.name)
    error_console.print(table)

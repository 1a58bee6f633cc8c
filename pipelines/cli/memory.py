"""`bmojo remember`, `bmojo ask` and `bmojo store`: documents that a model reads again while it decodes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from base.errors import UserError
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
    load_trained,
)
from pipelines.cli.progress import delivery_progress
from pipelines.cli.serve import model_name
from pipelines.memory.store import MANIFEST, DocumentStore, ModelSource, Problem
from pipelines.storage import LocalStorage, open_storage

if TYPE_CHECKING:
    from pipelines.memory.models import Loaded

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
            "left out: each file is one document. Another number than before replaces the documents of the files.",
        ),
    ] = None,
    storage: StorageOption = "runs",
) -> None:  # fmt: skip
    """Let a model read files, and keep what it remembers of them for `bmojo ask`.

    Kept are, of each document, the decoding state and the tokens that the eidetic layers chose. That is as many bytes
    however long it is, unless the model has layers of full attention, whose caches are kept whole. What is in the store
    already is skipped, so the same command resumes after a kill. A file that was edited replaces what the store had of
    it. Hidden files and stores in the folders are left out.

    Example: `bmojo remember notes.store notes/ --model quickstart`
    """
    from pipelines.memory.remembering import check_model, files_of, remember_files

    place = open_storage(store)
    found = files_of(files, place.path() if isinstance(place, LocalStorage) else None)
    known = DocumentStore.open(place).manifest.identity.source if place.exists(MANIFEST) else None
    with error_console.status("Loading the model ..."):
        loaded = _load(place.url, model, stage, step, storage, known)
        check_model(loaded.model)
        opened = DocumentStore.create(place, loaded.identity)
    if loaded.model.init_state(1).room is not None:
        error_console.print(
            f"warning: {loaded.identity.pattern} has layers of full attention, whose caches are kept whole: the room "
            "that a document takes grows with its length. --part-tokens cuts long files.",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    with delivery_progress(console, "remembering (bytes)") as update:
        result = remember_files(opened, loaded.model, loaded.tokenizer, found, part_tokens, update)
    for empty in result.empty:
        error_console.print(f"warning: {empty} holds no text.", markup=False, soft_wrap=True)
    skipped = f", {result.num_skipped} were there already" if result.num_skipped else ""
    replaced = f", {result.num_replaced} of before were removed" if result.num_replaced else ""
    console.print(
        f"Remembered {result.num_documents} documents ({result.num_tokens:,} tokens) in {result.num_bytes / 1e6:.1f} MB"
        f"{skipped}{replaced}. Ask: bmojo ask {quote(store)} --query TEXT",
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
    show_sources: Annotated[
        bool,
        typer.Option(
            help="After the answer, show which documents were read: ATTENTION, the share of the eidetic layers' "
            "attention that each got; IN STATE, its share of the recurrent state that --begin composed (with decayed 1 "
            "for each: they are in it one after the other)."
        ),
    ] = False,
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
        forgetting = tau if tau is not None else loaded.model.config.innovation_tau
        memory = StoredMemory(opened, loaded.model, loaded.identity, documents, forgetting)
        drawing = Drawing(tokens, temperature, top_k, top_p, seed)
        answer = ask_store(loaded.model, loaded.tokenizer, memory, query, drawing, begin, documents)
    if as_json:
        text = "".join(answer.pieces())
        sources = [
            {
                "name": one.record.name, "part": one.record.part, "id": one.record.id, "attention": one.attention,
                "in_state": one.in_state,
            }
            for one in answer.sources()
        ]  # fmt: skip
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
    records, problems = opened.scan()
    _warn_of(problems)
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
        at = record.remembered_at.astimezone().strftime("%Y-%m-%d %H:%M")
        kb = f"{record.num_bytes / 1e3:,.0f}"
        table.add_row(record.id[:12], f"{record.num_tokens:,}", kb, at, escape(record.title))
    console.print(table)
    total_mb = sum(record.num_bytes for record in records) / 1e6
    console.print(f"{len(records)} documents, {total_mb:.1f} MB.")


@app.command(cls=OverridableCommand)
def forget(
    store: StoreArgument,
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCUMENT...",
            help="Names or ids as `bmojo store list` shows them; a file's name means all its parts.",
        ),
    ],
) -> None:
    """Remove documents from a store."""
    opened = DocumentStore.open(open_storage(store))
    records, problems = opened.scan()
    _warn_of(problems)
    for record in opened.named(documents, records):
        opened.remove(record)
        console.print(f"Forgot {record.title} ({record.id[:12]}).", markup=False, soft_wrap=True)


@app.command(cls=OverridableCommand)
def verify(
    store: StoreArgument,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove", help="Remove what is damaged, and what stopped writers left; remember the files again then."
        ),
    ] = False,
) -> None:
    """Read a store whole, and compare every file with its digest. Exit code 1 if something is damaged and stays.

    Documents may be added meanwhile: what is half written counts as left by a stopped writer after an hour.
    """
    opened = DocumentStore.open(open_storage(store))
    with delivery_progress(console, "checking (documents)") as update:
        problems = opened.verify(update)
    for problem in problems:
        error_console.print(f"{problem.name or problem.id[:12]}: {problem.problem}", markup=False, soft_wrap=True)
    if not problems:
        console.print(f"All {len(opened.records())} documents are as they were written.")
    elif remove:
        console.print(f"Removed {opened.remove_damaged(problems)} damaged or half-written documents.")
    else:
        raise typer.Exit(1)


def _load(
    store_url: str, model: str | None, stage: str | None, step: int | None, storage: str, known: ModelSource | None
) -> Loaded:
    """The model that is named, or else the one known to the store."""
    if model is not None:
        if (Path(model) / "config.json").is_file():
            return _of(ModelSource(model=model))
        return _of(ModelSource(model=model, storage=open_storage(storage).url, stage=stage, step=step))
    if known is None:
        raise UserError(f"{store_url}: name the model with --model: a folder of `bmojo export`, or a run.")
    try:
        return _of(known)
    except UserError as error:
        raise UserError(
            f"The store {store_url} was made by the model at {known.model}, which cannot be loaded: {error} If it has "
            "moved, --model says where it is now."
        ) from error


def _of(source: ModelSource) -> Loaded:
    from pipelines.memory.models import identified, load_exported

    if source.storage is None:
        return load_exported(Path(source.model))
    trained = load_trained(source.storage, source.model, source.stage, source.step)
    exact = source.model_copy(update={"model": trained.run.run_id, "stage": trained.stage})
    return identified(trained.model, trained.tokenizer, model_name(trained), exact)


def _warn_of(problems: Sequence[Problem]) -> None:
    for problem in problems:
        error_console.print(f"warning: {problem.problem}", markup=False, soft_wrap=True)


def _print_sources(sources: list[Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("ATTENTION", "IN STATE", "TOKENS", "DOCUMENT"):
        table.add_column(column, justify="left" if column == "DOCUMENT" else "right", overflow="fold")
    for one in sources:
        in_state = f"{one.in_state:.2f}" if one.in_state else ""
        name = escape(one.record.title)
        table.add_row(f"{100 * one.attention:.1f} %", in_state, f"{one.record.num_tokens:,}", name)
    error_console.print(table)

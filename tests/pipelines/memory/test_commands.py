"""`bmojo remember`, `bmojo ask`, `bmojo store`: what they print, and what they say when they cannot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from base.errors import UserError
from pipelines.cli.app import app
from pipelines.cli.console import console
from pipelines.memory.asking import StoredMemory, ask
from pipelines.memory.store import DocumentStore
from pipelines.stages.evaluate.language_model import Drawing
from pipelines.storage import open_storage
from tests.pipelines.memory.stores import TOKENIZER, exported, text_files
from tests.pipelines.stages.trained_run import tiny_model, trained_model

BEGINS = ("fresh", "nearest", "weighted", "decayed")


def run(*arguments: str, code: int = 0) -> str:
    console.file = None  # type: ignore[assignment]  # where --json leaves it for the rest of a process
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of four files, by an exported model."""
    folder = tmp_path_factory.mktemp("made")
    text_files(folder / "texts", 4)
    model = exported(folder / "export")
    said = run("remember", str(folder / "notes.store"), str(folder / "texts"), "--model", str(model))
    assert re.search(r"Remembered 4 documents \([\d,]+ tokens\) in [\d.]+ MB. Ask: bmojo ask", said)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> str:
    """A store of one's own."""
    shutil.copytree(made / "notes.store", tmp_path / "notes.store")
    return str(tmp_path / "notes.store")


def test_remember_skips_what_is_there_and_ask_finds_the_model_itself(store: str, made: Path) -> None:
    again = run("remember", store, str(made / "texts"), "--model", str(made / "export" / "model"))
    assert "Remembered 0 documents" in again
    assert "4 were there already" in again
    said = run("ask", store, "--query", "def function", "--tokens", "5", "--show-sources")
    assert said.startswith("def function")
    assert "ATTENTION" in said
    assert sum(f"{n}.txt" in said for n in range(4)) >= 1


def test_answers_as_json_name_their_sources(store: str) -> None:
    found = json.loads(run("ask", store, "--query", "def", "--tokens", "4", "--temperature", "0", "--json"))
    assert found["query"] == "def"
    assert {one["name"].rpartition("/")[2] for one in found["sources"]} <= {f"{n}.txt" for n in range(4)}
    assert 0 < sum(one["attention"] for one in found["sources"]) < 1
    repeated = json.loads(run("ask", store, "--query", "def", "--tokens", "4", "--temperature", "0", "--json"))
    assert repeated == found


@pytest.mark.parametrize("begin", BEGINS)
def test_every_beginning_answers(store: str, begin: str) -> None:
    found = json.loads(run("ask", store, "--query", "def", "--tokens", "3", "--begin", begin, "--json"))
    held = [one for one in found["sources"] if one["in_state"]]
    assert len(held) == {"fresh": 0, "nearest": 1}.get(begin, 4)
    if begin == "weighted":
        assert sum(one["in_state"] for one in held) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("begin", BEGINS[1:])
def test_a_store_of_one_document_answers_as_its_saved_state(made: Path, tmp_path: Path, begin: str) -> None:
    model = tiny_model()
    (file,) = text_files(tmp_path / "texts", 1)
    place = str(tmp_path / "one.store")
    run("remember", place, str(file), "--model", str(made / "export" / "model"))
    memory = StoredMemory(DocumentStore.open(open_storage(place)), model)
    drawing = Drawing(9, temperature=0.0)
    answer = ask(model, TOKENIZER, memory, " x", drawing, begin)  # type: ignore[arg-type]  # begin: a Literal, as a str
    document, query = TOKENIZER.encode_batch([file.read_text(), " x"])
    logits, state = model.prefill(torch.tensor([[TOKENIZER.eod_id, *document.tolist()]]))
    for token in query.tolist():
        logits, state = model.step(torch.tensor([token]), state)
    torch.testing.assert_close(answer.asked.logits_bv, logits, rtol=0, atol=1e-5)
    expected = []
    for _ in range(9):
        expected.append(int(logits[0, : TOKENIZER.vocab_size].argmax()))
        logits, state = model.step(torch.tensor([expected[-1]]), state)
    if TOKENIZER.eod_id in expected:
        expected = expected[: expected.index(TOKENIZER.eod_id)]
    assert "".join(answer.pieces()) == TOKENIZER.decode(expected).decode("utf-8", "replace")


def test_a_run_is_a_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_model(tmp_path)
    monkeypatch.setattr("pipelines.cli.memory.load_for_decoding", lambda *_: trained)
    place, files = str(tmp_path / "notes.store"), text_files(tmp_path / "texts", 1)
    run("remember", place, str(files[0]), "--model", "tiny", "--storage", str(tmp_path / "runs"))
    source = DocumentStore.open(open_storage(place)).manifest.identity.source
    assert source is not None
    assert (source.model, source.storage, source.stage) == ("tiny-00000000", str(tmp_path / "runs"), "train")
    assert run("ask", place, "--query", "def", "--tokens", "1").startswith("def")


def test_documents_are_listed_verified_and_forgotten(store: str) -> None:
    listed = run("store", "list", store)
    assert "4 documents" in listed
    assert all(f"{n}.txt" in listed for n in range(4))
    records = json.loads(run("store", "list", store, "--json"))
    assert run("store", "forget", store, records[0]["id"][:12]).startswith(f"Forgot {records[0]['name']}")
    assert "All 3 documents are as they were written" in run("store", "verify", store)
    damaged = Path(store) / "documents" / records[1]["id"] / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "state.safetensors is damaged" in run("store", "verify", store, code=1)
    assert "Removed 1 damaged" in run("store", "verify", store, "--remove")
    assert "2 documents" in run("store", "list", store)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "STORE", "--query", ""), "--query is empty"),
        (("ask", "nowhere", "--query", "x"), "There is no store of documents"),
        (("ask", "STORE", "--query", "x", "--model", "OTHER"), "the weights differ"),
        (("remember", "nowhere", "TEXTS"), "name the model with --model"),
        (("remember", "nowhere", "missing.txt", "--model", "OTHER"), "no such file"),
        (("remember", "PLAIN.store", "TEXTS", "--model", "PLAIN"), "no layer with an eidetic memory"),
    ],
)
def test_what_cannot_be_is_said(
    store: str, made: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    if "OTHER" in arguments:
        other = tiny_model()
        with torch.no_grad():
            other.norm.weight += 1
        exported(tmp_path / "other", other)
    if "PLAIN" in arguments:
        exported(tmp_path / "plain", tiny_model("mamba2*2"))
    places = {"STORE": store, "TEXTS": str(made / "texts"), "OTHER": str(tmp_path / "other" / "model"),
              "PLAIN": str(tmp_path / "plain" / "model"), "nowhere": str(tmp_path / "nowhere"),
              "PLAIN.store": str(tmp_path / "plain.store")}  # fmt: skip
    with pytest.raises(UserError, match=message):
        run(*(places.get(argument, argument) for argument in arguments))


def test_an_empty_store_is_said_to_be_empty(store: str) -> None:
    names = [one["name"] for one in json.loads(run("store", "list", store, "--json"))]
    run("store", "forget", store, *names)
    with pytest.raises(UserError, match="holds no documents"):
        run("ask", store, "--query", "x")

"""`bmojo remember`, `bmojo ask`, `bmojo store`: what they print, and what they say when they cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from base.errors import UserError
from bmojo import BMojoLM
from bmojo.long_term import Composition
from pipelines.cli.app import app
from pipelines.cli.console import console
from pipelines.memory.asking import StoredMemory, ask
from pipelines.memory.models import load_exported
from pipelines.memory.store import DocumentStore
from pipelines.stages.evaluate.language_model import Drawing
from pipelines.storage import open_storage
from tests.pipelines.memory.stores import exported, text_files
from tests.pipelines.stages.trained_run import tiny_model, trained_model

BEGINS: tuple[Composition, ...] = get_args(Composition)


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
    again = run("remember", store, str(made / "texts"))
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
def test_a_store_of_one_document_answers_as_its_saved_state(made: Path, tmp_path: Path, begin: Composition) -> None:
    model, tokenizer, identity = load_exported(made / "export" / "model")
    (file,) = text_files(tmp_path / "texts", 1)
    place = str(tmp_path / "one.store")
    run("remember", place, str(file), "--model", str(made / "export" / "model"))
    memory = StoredMemory(DocumentStore.open(open_storage(place)), model, identity)
    drawing = Drawing(9, temperature=0.0)
    answer = ask(model, tokenizer, memory, " x", drawing, begin)
    document, query = tokenizer.encode_batch([file.read_text(), " x"])
    logits, state = model.prefill(torch.tensor([[tokenizer.eod_id, *document.tolist()]]))
    for token in query.tolist():
        logits, state = model.step(torch.tensor([token]), state)
    torch.testing.assert_close(answer.asked.logits_bv, logits, rtol=0, atol=1e-5)
    expected = []
    for _ in range(9):
        expected.append(int(logits[0, : tokenizer.vocab_size].argmax()))
        logits, state = model.step(torch.tensor([expected[-1]]), state)
    if tokenizer.eod_id in expected:
        expected = expected[: expected.index(tokenizer.eod_id)]
    assert "".join(answer.pieces()) == tokenizer.decode(expected).decode("utf-8", "replace")


def test_a_run_is_a_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_model(tmp_path)
    monkeypatch.setattr("pipelines.cli.memory.load_trained", lambda *_: trained)
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
    damaged = Path(store) / "tensors" / records[1]["folder"] / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "state.safetensors is damaged" in run("store", "verify", store, code=1)
    assert "Removed 1 damaged" in run("store", "verify", store, "--remove")
    assert "2 documents" in run("store", "list", store)


@pytest.mark.parametrize(("remembers_in", "asks_in"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_what_a_gpu_remembered_a_cpu_reads_and_the_other_way_round(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembers_in: str, asks_in: str
) -> None:
    """They compute in different precisions, with the weights of one model."""
    place = str(tmp_path / "notes.store")
    monkeypatch.setattr("pipelines.stages.models.used_precision", lambda *_: remembers_in)
    run("remember", place, str(made / "texts"), "--model", str(made / "export" / "model"))
    (dtype,) = {one["dtype"] for one in json.loads(run("store", "list", place, "--json"))}
    assert dtype == {"bf16": "bfloat16", "fp32": "float32"}[remembers_in]
    monkeypatch.setattr("pipelines.stages.models.used_precision", lambda *_: asks_in)
    for begin in BEGINS:
        found = json.loads(run("ask", place, "--query", "def", "--tokens", "2", "--begin", begin, "--json"))
        assert found["sources"]


def test_a_store_in_the_folder_it_reads_is_not_read(made: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    text_files(texts, 2)
    for said in ("Remembered 2 documents", "Remembered 0 documents"):
        model = ("--model", str(made / "export" / "model"))
        assert said in run("remember", str(texts / "notes.store"), str(texts), *model)


def test_an_edited_file_is_read_as_it_is_now(made: Path, tmp_path: Path) -> None:
    place, (file,) = str(tmp_path / "my store"), text_files(tmp_path / "texts", 1)
    said = run("remember", place, str(file), "--model", str(made / "export" / "model"))
    assert f"bmojo ask '{place}' --query" in said
    file.write_text("".join(f"print({n})\n" for n in range(20)))
    assert "1 of before were removed" in run("remember", place, str(file), "--part-tokens", "9")
    parts = json.loads(run("store", "list", place, "--json"))
    assert [one["part"] for one in parts] == list(range(1, len(parts) + 1))
    assert {one["name"] for one in parts} == {str(file)}
    assert run("store", "forget", place, str(file)).count("Forgot") == len(parts) > 1
    assert json.loads(run("store", "list", place, "--json")) == []


def test_names_are_shown_as_they_are(made: Path, tmp_path: Path) -> None:
    """Also where they look like markup, or are not UTF-8."""
    place, texts = str(tmp_path / "notes.store"), tmp_path / "texts"
    texts.mkdir()
    latin1 = Path(os.fsdecode(os.fsencode(texts) + b"/caf\xe9.txt"))
    for number, file in enumerate((texts / "plan [draft].txt", texts / "a[" / "y].txt", latin1)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"def function_{number}(x):")
    run("remember", place, str(texts), "--model", str(made / "export" / "model"))
    listed = run("store", "list", place)
    asked = run("ask", place, "--query", "def", "--tokens", "1", "--begin", "decayed", "--show-sources")
    for said in (listed, asked, run("store", "list", place, "--json").replace("\\\\", "\\")):
        assert all(name in said for name in ("plan [draft].txt", "a[/y].txt", "caf\\xe9.txt")), said


def test_times_are_iso_8601_in_utc(store: str) -> None:
    for one in json.loads(run("store", "list", store, "--json")):
        assert datetime.fromisoformat(one["remembered_at"]).utcoffset() == timedelta(0)


def test_one_damaged_record_hides_no_other_document(store: str) -> None:
    records = json.loads(run("store", "list", store, "--json"))
    (Path(store) / "documents" / f"{records[0]['id']}.json").write_text("{")
    listed = run("store", "list", store)
    assert "3 documents" in listed
    assert re.search(rf"warning: document {records[0]['id'][:12]}: .* is damaged", listed)
    assert "Forgot" in run("store", "forget", store, records[1]["name"])


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_export_is_named(made: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(made / "export" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    other = save({"other.weight": torch.zeros(1)})
    weights.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": other}[damage])
    message = "the weights lack embedding.weight" if damage == "other" else f"{weights} is damaged: .*Copy it again"
    with pytest.raises(UserError, match=message):
        run("remember", str(tmp_path / "s"), str(made / "texts"), "--model", str(tmp_path / "model"))


def test_a_model_that_has_moved_is_asked_for(made: Path, tmp_path: Path) -> None:
    old, new, place = tmp_path / "old", tmp_path / "new", str(tmp_path / "notes.store")
    shutil.copytree(made / "export" / "model", old)
    run("remember", place, str(made / "texts" / "0.txt"), "--model", str(old))
    old.rename(new)
    with pytest.raises(UserError, match=rf"made by the model at {old}, .* --model says where it is now"):
        run("ask", place, "--query", "def")
    assert run("ask", place, "--query", "def", "--tokens", "1", "--model", str(new)).startswith("def")


def test_documents_that_grow_with_their_length_are_announced(made: Path, tmp_path: Path) -> None:
    text = str(made / "texts" / "0.txt")
    hybrid = exported(tmp_path / "hybrid", tiny_model("bmojo,attention"))
    assert "grows with its length" in run("remember", str(tmp_path / "a"), text, "--model", str(hybrid))
    model = str(made / "export" / "model")
    assert "grows with its length" not in run("remember", str(tmp_path / "b"), text, "--model", model)


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
        (("remember", "PLAIN.store", "TEXTS", "--model", "ORACLE"), "selection is oracle"),
        (("store", "forget", "STORE", ""), "There is no document ''"),
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
    if "ORACLE" in arguments:
        exported(tmp_path / "oracle", BMojoLM(tiny_model().config.replace(selection="oracle")))
    places = {"STORE": store, "TEXTS": str(made / "texts"), "OTHER": str(tmp_path / "other" / "model"),
              "PLAIN": str(tmp_path / "plain" / "model"), "nowhere": str(tmp_path / "nowhere"),
              "ORACLE": str(tmp_path / "oracle" / "model"), "PLAIN.store": str(tmp_path / "plain.store")}  # fmt: skip
    with pytest.raises(UserError, match=message):
        run(*(places.get(argument, argument) for argument in arguments))


def test_an_empty_store_is_said_to_be_empty(store: str) -> None:
    names = [one["name"] for one in json.loads(run("store", "list", store, "--json"))]
    run("store", "forget", store, *names)
    with pytest.raises(UserError, match="holds no documents"):
        run("ask", store, "--query", "x")

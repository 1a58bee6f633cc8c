"""Stores of tiny models, and what tests put into them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bmojo import BMojoLM
from bmojo.hf import export_to_hf
from data.tokenizer import Tokenizer
from pipelines.memory.store import DocumentStore, ModelIdentity
from pipelines.serving.context import model_digest
from pipelines.storage import Storage
from tests.pipelines.stages.trained_run import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def identity(model: BMojoLM) -> ModelIdentity:
    digest = model_digest(model, TOKENIZER.sha256)
    return ModelIdentity(name="tiny", digest=digest, tokenizer_sha256=TOKENIZER.sha256, pattern=model.config.pattern)


def store_of(storage: Storage, model: BMojoLM | None = None) -> DocumentStore:
    return DocumentStore.create(storage, identity(model or tiny_model()))


def exported(folder: Path, model: BMojoLM | None = None, tokenizer: Tokenizer = TOKENIZER) -> Path:
    """A folder as `bmojo export` writes it."""
    tokenizer.save(folder / "tokenizer")
    export_to_hf(model or tiny_model(), folder / "tokenizer" / "tokenizer.json", folder / "model")
    return folder / "model"


def text_files(folder: Path, number: int) -> list[Path]:
    """Short texts, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{n}.txt" for n in range(number)]
    for n, file in enumerate(files):
        file.write_text(f"def function_{n}(x):\n    return x + {n}\n" * 3, encoding="utf-8")
    return files


def make_old(store: Path) -> None:
    """Make all that was written to a store look as if it had been written two hours ago."""
    long_ago = time.time() - 2 * 3600
    for path in store.rglob("*"):
        os.utime(path, (long_ago, long_ago))

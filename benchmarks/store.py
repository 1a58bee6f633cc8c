"""Facts planted in documents that were read long before: what comes back through a store, without it, and by text.

    python -m benchmarks.store

Documents are those of associative recall: pairs of a key and a value, then random values. Facts stand in some of them;
the others, read later, have other keys. A question is random values and a key, and the answer is its value.

A small model is trained once per pattern and seed (minutes), and kept under --out with its store and the results: what
is there is not done again. The report is written from whatever is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import _store_report as store_report
from benchmarks._store_training import MODELS, TASK, Training, trained
from bmojo import BMojoLM
from bmojo.long_term import Composition, LongTermMemory, read
from pipelines.memory.asking import StoredMemory, start_from
from pipelines.memory.remembering import Remembered, remember_tokens
from pipelines.memory.store import DocumentStore, ModelIdentity
from pipelines.memory.tensors import eidetic_of_all
from pipelines.storage import open_storage

BEGINNINGS: tuple[Composition, ...] = ("nearest", "weighted", "decayed")
ASKED_TOGETHER = 64  # questions side by side


@dataclass(frozen=True)
class Setting:
    """What is measured. Distances and lengths in tokens."""

    distances: tuple[int, ...] = (1_000, 10_000, 100_000)
    document_tokens: int = 64
    num_fact_documents: int = 32
    question_tokens: int = 24  # before the key
    num_composed: int = 8  # fact documents asked with each way to begin: they are asked one by one
    num_streamed: int = 8  # fact documents asked without a store: all later tokens are read after each


class Library:
    """Documents and questions. Keys of facts are never those of documents read later."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self._rng = setting, np.random.default_rng(seed)
        self._num_keys = TASK.vocab_size // 2
        half = self._num_keys // 2
        self.facts = [self._document(0, half) for _ in range(setting.num_fact_documents)]
        most = max(setting.distances) // setting.document_tokens
        self.later = [self._document(half, half) for _ in range(most)]
        pairs = [list(zip(document[0:16:2], document[1:16:2], strict=True)) for document in self.facts]
        self.questions = [[[*self._noise(setting.question_tokens), key] for key, _ in of] for of in pairs]
        self.answers = [[value for _, value in of] for of in pairs]

    def _document(self, first_key: int, num_keys: int) -> list[int]:
        keys = first_key + self._rng.permutation(num_keys)[: TASK.num_pairs]
        pairs = np.stack([keys, self._noise(TASK.num_pairs)], 1).ravel().tolist()
        return [*pairs, *self._noise(self.setting.document_tokens - len(pairs))]

    def _noise(self, number: int) -> list[int]:
        noise: list[int] = self._rng.integers(self._num_keys, TASK.vocab_size, number).tolist()
        return noise


class Bench:
    """One model, with a library in a store."""

    def __init__(self, model: BMojoLM, setting: Setting, seed: int, folder: Path) -> None:
        self.model, self.setting, self.library = model, setting, Library(setting, seed)
        identity = ModelIdentity(name="bench", digest="0", tokenizer_sha256="0", pattern=model.config.pattern)
        self._store = DocumentStore.create(open_storage(folder), identity)
        for name, documents in (("fact", self.library.facts), ("later", self.library.later)):
            for number, document in enumerate(documents):
                remember_tokens(self._store, model, f"{name} {number}", document, Remembered())
        self._stored = StoredMemory(self._store, model, identity)
        records = self._stored.records
        self._eidetic = eidetic_of_all(self._store, records)
        self.bytes_per_document = sum(one.num_bytes for one in records) / len(records)
        self.eidetic_bytes = records[0].files["eidetic.safetensors"].num_bytes
        self.num_facts = len(self.library.facts)
        assert [one.name.partition(" ")[0] for one in records[: self.num_facts]] == ["fact"] * self.num_facts
        self._answers = torch.tensor(self.library.answers)  # [f, q]
        self.num_questions = self._answers.numel()

    def num_later(self, distance: int) -> int:
        return distance // self.setting.document_tokens

    def with_store(self, distance: int, num_read: int) -> tuple[list[bool], list[int]]:
        """Every question, beside one fact document and all later ones. Returns right, and the document that got most
        attention at the key (0: the fact's; n: the n-th later one)."""
        memory, num_documents = self._memory(distance, num_read)
        questions = torch.tensor(self.library.questions).flatten(0, 1)  # [f q, t]
        facts = torch.arange(self.num_facts).repeat_interleave(TASK.num_pairs)
        logits, most = [], []
        for questions_bt, fact_b in zip(questions.split(ASKED_TOGETHER), facts.split(ASKED_TOGETHER), strict=True):
            hidden_bn = torch.zeros(len(questions_bt), num_documents, dtype=torch.bool)
            hidden_bn[:, : self.num_facts] = fact_b[:, None] != torch.arange(self.num_facts)
            state, before_bn = self.model.init_state(len(questions_bt)), torch.zeros(hidden_bn.shape)
            with torch.no_grad(), memory.read_by(hidden_bn) as reading:
                for tokens_b in questions_bt.T:
                    before_bn = reading.attention()
                    logits_bv, state = self.model.step(tokens_b, state)
                most.append((reading.attention() - before_bn).argmax(1))
            logits.append(logits_bv)
        nearest_b = torch.where(torch.cat(most) == facts, 0, torch.cat(most) - self.num_facts + 1)
        return self._right(torch.cat(logits)), nearest_b.tolist()

    def without_store(self, distance: int) -> list[bool]:
        """The same stream of documents in one decoding state, then each question."""
        later = [token for document in self.library.later[: self.num_later(distance)] for token in document]
        stream = torch.tensor([fact + later for fact in self.library.facts[: self.setting.num_streamed]])
        _, state = self.model.prefill(stream)
        of_question = torch.arange(len(stream)).repeat_interleave(TASK.num_pairs)
        questions = torch.tensor(self.library.questions[: len(stream)]).flatten(0, 1)
        return self._right(self.model.prefill(questions, state.select(of_question))[0])

    def prepended(self, nearest: Sequence[int]) -> list[bool]:
        """The text of the document that the index found, in front of the question."""
        rows = []
        for number, near in enumerate(nearest):
            fact, question = divmod(number, TASK.num_pairs)
            text = self.library.facts[fact] if near == 0 else self.library.later[near - 1]
            rows.append(text + self.library.questions[fact][question])
        return self._right(self.model.prefill(torch.tensor(rows))[0])

    def begun(self, distance: int, begin: Composition) -> list[bool]:
        """As with_store, one question after the other, from a state that is composed of the four nearest documents."""
        memory, num_documents = self._memory(distance, 4)
        right = []
        for fact in range(self.setting.num_composed):
            hidden_n = torch.zeros(num_documents, dtype=torch.bool)
            hidden_n[: self.num_facts] = True
            hidden_n[fact] = False
            for question, answer in zip(self.library.questions[fact], self.library.answers[fact], strict=True):
                _, _, near_n = read(self.model, memory, question, None, hidden_n)
                start = start_from(self.model, self._stored.document, near_n, begin, num_composed=4)
                held_n = hidden_n.clone()
                held_n[start.numbers[-1]] = True
                logits_1v, _, _ = read(self.model, memory, question, start.state, held_n)
                right.append(int(logits_1v[0].argmax()) == answer)
        return right

    def _memory(self, distance: int, num_read: int) -> tuple[LongTermMemory, int]:
        num_documents = self.num_facts + self.num_later(distance)
        return LongTermMemory(self.model, self._eidetic[:num_documents], num_read), num_documents

    def _right(self, logits_bv: Tensor) -> list[bool]:
        return (logits_bv.argmax(-1) == self._answers.flatten()[: len(logits_bv)]).tolist()


class Record:
    """Results of one model in a file, row by row: what is there is not measured again."""

    def __init__(self, file: Path, training: Training, setting: Setting) -> None:
        self._file = file
        self.content: dict[str, Any] = {"pattern": training.pattern, "seed": training.seed, "setting": asdict(setting)}
        self.content = json.loads(json.dumps({**self.content, "rows": []}))
        if file.exists():
            there = json.loads(file.read_text())
            if there["setting"] != self.content["setting"]:
                raise SystemExit(f"{file} was measured with {there['setting']}. Give another --out.")
            self.content = there

    def note(self, **facts: object) -> None:
        """Write facts about all rows."""
        self.content |= facts
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.content))
        scratch.replace(self._file)

    def row(self, how: str, distance: int, ask: Callable[[], tuple[list[bool], list[int]]]) -> list[int]:
        """Ask unless the row is there. `ask` gives what is right, and the nearest documents, which are returned."""
        for row in self.content["rows"]:
            if (row["how"], row["distance"]) == (how, distance):
                return list(row["nearest"])
        right, nearest = ask()
        row = {"how": how, "distance": distance, "right": sum(right), "asked": len(right), "nearest": nearest}
        self.content["rows"].append(row)
        self.note()
        print(f"{self._file.stem}, {distance:,} tokens, {how}: {sum(right) / len(right):.3f}", flush=True)
        return nearest


def measure(training: Training, setting: Setting, folder: Path) -> dict[str, Any]:
    """Train if need be, remember, ask. Returns the content of the record."""
    record = Record(folder / f"{training.pattern}-{training.seed}.json", training, setting)
    model = trained(training, folder / "models")
    bench = Bench(model, setting, 1_000_003 + training.seed, folder / "stores" / f"{training.pattern}-{training.seed}")
    record.note(
        bytes_per_document=bench.bytes_per_document, eidetic_bytes=bench.eidetic_bytes,
        num_params=sum(parameter.numel() for parameter in model.parameters()), torch=torch.__version__,
    )  # fmt: skip
    record.row("right text in front", 0, lambda: (bench.prepended([0] * bench.num_questions), []))
    at = setting.distances[0]
    for begin in BEGINNINGS:
        record.row(f"store, 4 documents, begin {begin}", at, lambda begin=begin: (bench.begun(at, begin), []))
    for at in setting.distances:
        record.row("store, 1 document per token", at, partial(bench.with_store, at, 1))
        nearest = record.row("store, 4 documents per token", at, partial(bench.with_store, at, 4))
        record.row("found text in front", at, lambda nearest=nearest: (bench.prepended(nearest), []))
        record.row("no store", at, lambda at=at: (bench.without_store(at), []))
    return record.content


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the report."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for pattern in options.patterns:
            measure(Training(pattern, seed), Setting(), options.out)
    records = [json.loads(file.read_text()) for file in sorted(options.out.glob("*-*.json"))]
    print(store_report.table(records))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patterns", nargs="+", choices=list(MODELS), default=list(MODELS), help="models")
    parser.add_argument("--seeds", type=int, default=3, help="models of each pattern (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/store"), help="folder of models and results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

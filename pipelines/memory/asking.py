"""Questions to a store: the model reads its documents while it reads the question and draws the answer."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import NamedTuple

import torch
from torch import Tensor

from base.errors import UserError
from bmojo import BMojoLM
from bmojo.generation import continue_from
from bmojo.long_term import Composition, LongTermMemory, RememberedDocument, compose, read
from bmojo.state import DecodingState
from pipelines.memory.store import DocumentRecord, DocumentStore, ModelIdentity
from pipelines.memory.tensors import eidetic_of_all, remembered
from pipelines.stages.evaluate.language_model import Drawing, TextTokenizer, beginning


class Source(NamedTuple):
    """A document that was read.

    Attributes:
        attention: share of the attention of eidetic layers that its tokens got, mean over layers, heads and tokens.
        in_state: share of the recurrent state that decoding began with, as far as states are composed by weights; 1: it
            is the document's. 0: the state does not hold the document.
    """

    record: DocumentRecord
    attention: float
    in_state: float


class StoredMemory:
    """All documents of a store, loaded for a model: eidetic tokens now, decoding states when they are wanted."""

    def __init__(
        self, store: DocumentStore, model: BMojoLM, identity: ModelIdentity, num_read: int = 4,
        tau: float | None = None,
    ) -> None:  # fmt: skip
        """Args:
            identity: the model's, as pipelines.memory.models makes it; no other than the store's may read it.
            num_read, tau: see LongTermMemory; the age of a document is the tokens remembered after it.
        Raises: UserError: the store is empty, or the model cannot read it. DamagedError: it names the document.
        """
        store.check_model(identity)
        self.records, url = store.records(), store.storage.url
        if not self.records:
            raise UserError(f"The store {url} holds no documents. Add some: bmojo remember {quote(url)} FILES.")
        self._store, self._like = store, model.init_state(1)
        ages, age = [], 0
        for record in reversed(self.records):
            ages.append(float(age))
            age += record.num_tokens
        try:
            self.tokens = LongTermMemory(model, eidetic_of_all(store, self.records), num_read, ages[::-1], tau)
        except ValueError as error:
            raise UserError(f"{url}: {error}") from error

    def document(self, number: int) -> RememberedDocument:
        """The document of this number in `records`, from storage. Raises: DamagedError."""
        return remembered(self._store, self.records[number], self._like)


class Start(NamedTuple):
    """What decoding begins with.

    Attributes:
        numbers: of the documents that are in the state, the nearest last: that one is in it whole.
        shares: of each in the recurrent state, as Source.in_state.
    """

    state: DecodingState
    numbers: list[int]
    shares: list[float]


def start_from(
    model: BMojoLM, document: Callable[[int], RememberedDocument], near_n: Tensor, begin: Composition,
    num_composed: int,
) -> Start:  # fmt: skip
    """Compose the states of the nearest documents.

    Args: document: loads one by number. near_n: how near each is; those at 0 are left out, while one is left.
    Raises: UserError: the states of the model's layers cannot be composed so.
    """
    most = 1 if begin == "nearest" else num_composed
    near_d, number_d = near_n.topk(min(most, len(near_n)))
    numbers = [number for number, near in zip(number_d.tolist(), near_d.tolist(), strict=True) if near > 0]
    numbers = (numbers or number_d[:1].tolist())[::-1]
    weights = [float(near_n[number]) for number in numbers] if begin == "weighted" else None
    try:
        state = compose(model, [document(number) for number in numbers], weights)
    except ValueError as error:
        raise UserError(f"--begin {begin}: {error}") from error
    total = sum(weights or [])
    return Start(state, numbers, [weight / total for weight in weights] if weights and total else [1.0] * len(numbers))


class Asked:
    """Questions that were read, one per row; then `draw` once."""

    def __init__(
        self,
        model: BMojoLM,
        memory: StoredMemory,
        queries: Sequence[Sequence[int]],
        start_ids: Sequence[int],
        begin: Composition = "fresh",
        num_composed: int = 4,
    ) -> None:
        """Read the questions.

        Args:
            queries: token ids, at least one each.
            start_ids: what stands before the first token of a document; read before a question that begins one.
            begin: what decoding begins with.
            num_composed: documents whose states are composed, at most.
        Raises: UserError: the states of the model's layers cannot be composed so.
        """
        self._model, self._memory = model, memory
        num_rows, num_documents = len(queries), len(memory.records)
        device = model.embedding.weight.device
        self._hidden_bn = torch.zeros(num_rows, num_documents, dtype=torch.bool, device=device)
        self._in_state_bn = torch.zeros(num_rows, num_documents, device=device)
        self._attention_bn = torch.zeros(num_rows, num_documents, device=device)
        self._num_tokens_b = torch.zeros(num_rows, device=device)
        parts = []
        for row, query in enumerate(queries):
            tokens = [*start_ids, *query]
            logits_1v, state, attention_n = read(model, memory.tokens, tokens, None, self._hidden_bn[row])
            if begin != "fresh":
                near_n = attention_n * memory.tokens.forgotten_n
                start = start_from(model, memory.document, near_n, begin, num_composed)
                self._in_state_bn[row, start.numbers] = torch.tensor(start.shares, device=device)
                self._hidden_bn[row, start.numbers[-1]] = True  # the state holds it: it is not read once more
                tokens = list(query)
                logits_1v, state, attention_n = read(model, memory.tokens, tokens, start.state, self._hidden_bn[row])
            self._attention_bn[row] = attention_n
            self._num_tokens_b[row] = len(tokens)
            parts.append((logits_1v, state))
        self.logits_bv = torch.cat([logits for logits, _ in parts])
        self._state = DecodingState.join([state for _, state in parts])

    @torch.no_grad()
    def draw(
        self, drawing: Drawing, stop_tokens: Collection[int] = (), num_token_ids: int | None = None
    ) -> Iterator[Tensor]:
        """Yield tokens_b as bmojo.generation.generate does; each one reads the documents.

        A row that drew one of the stop tokens reads on until all have, which counts no more in its sources.
        """
        stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=self._hidden_bn.device)
        with self._memory.tokens.read_by(self._hidden_bn) as reading:
            before_bn = reading.attention()
            counts_b = torch.zeros_like(self._num_tokens_b)  # 1 where the token that was read last counts
            is_open_b = torch.ones_like(counts_b, dtype=torch.bool)
            drawn = continue_from(
                self._model, self.logits_bv, self._state, **drawing._asdict(), stop_tokens=stop_tokens,
                num_token_ids=num_token_ids,
            )  # fmt: skip
            for tokens_b in drawn:
                now_bn = reading.attention()
                self._attention_bn += (now_bn - before_bn) * counts_b[:, None]
                self._num_tokens_b += counts_b
                is_open_b = is_open_b & ~torch.isin(tokens_b, stops)
                before_bn, counts_b = now_bn, is_open_b.to(counts_b.dtype)
                yield tokens_b

    def sources(self, row: int = 0) -> list[Source]:
        """Documents that a row has read so far, those that got most first."""
        attention = (self._attention_bn[row] / self._num_tokens_b[row].clamp_min(1)).tolist()
        found = zip(self._memory.records, attention, self._in_state_bn[row].tolist(), strict=True)
        read_ones = [Source(*one) for one in found if one[1] > 0 or one[2] > 0]
        return sorted(read_ones, key=lambda one: (one.in_state, one.attention), reverse=True)


@dataclass
class Answer:
    """The answer to one question, as text. `sources` is complete once `pieces` is exhausted."""

    asked: Asked
    tokenizer: TextTokenizer
    drawing: Drawing

    def pieces(self) -> Iterator[str]:
        """Yield the text as it is drawn. Bytes that do not form UTF-8 appear as the replacement character."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_b in self.asked.draw(self.drawing, (self.tokenizer.eod_id,), self.tokenizer.vocab_size):
            token = int(token_b[0])
            if token == self.tokenizer.eod_id:
                break
            yield decoder.decode(self.tokenizer.decode([token]))
        yield decoder.decode(b"", final=True)

    def sources(self) -> list[Source]:
        """Documents that were read so far."""
        return self.asked.sources()


def ask(
    model: BMojoLM,
    tokenizer: TextTokenizer,
    memory: StoredMemory,
    query: str,
    drawing: Drawing,
    begin: Composition = "fresh",
    num_composed: int = 4,
) -> Answer:
    """Read a question; the answer is drawn as its pieces are taken.

    Raises: UserError: the question is empty, or see Asked.
    """
    try:
        ids: list[int] = tokenizer.encode_batch([query])[0].tolist()
    except UnicodeEncodeError as error:
        raise UserError("--query cannot be encoded in UTF-8.") from error
    if not ids:
        raise UserError("--query is empty. Give the beginning of a text that the answer goes on with.")
    return Answer(Asked(model, memory, [ids], beginning(tokenizer), begin, num_composed), tokenizer, drawing)

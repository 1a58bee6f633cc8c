"""The work of the measure `text`: sums of each document, from its tokens wherever they are packed.

Sums are float64, added up on the host in one order, so that figures do not depend on the device's.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.config import SyntheticSource
from data.lineage import Documents, all_documents
from data.shards import TokenBatch, read_token_batches, read_token_documents
from pipelines.stages.evaluate.continuations import Continuation, score_texts
from pipelines.stages.evaluate.language_model import beginning
from pipelines.stages.evaluate.measures.figures import figure_of, identity_of
from pipelines.stages.evaluate.measures.measure import Measured, Setting, Units
from pipelines.stages.evaluate.results import Figure, MeasureResult
from pipelines.stages.evaluate.validation import validation_split
from pipelines.stages.train.device import copy_to
from pipelines.stages.uncertainty import Ratio

if TYPE_CHECKING:
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.evaluate.language_model import LanguageModel
    from pipelines.stages.evaluate.measures.measure import TaskResult

_COLUMNS = ("nll", "tokens", "bytes", "right")
_VALIDATION = (
    "Loss, perplexity and bits per byte are on the validation split: documents chosen by a hash of their text, none of "
    "which is in the training split. Bits per byte compares models with different tokenizers."
)
_BASELINES = {
    "gzip -9": "gzip -9 is scored on the same text.",
    "untrained": "So is the untrained model, the same architecture before its first step.",
}
_AS_TEXT = (
    "The model reads the documents with its own tokenizer, in windows of {} of its tokens. Bits per byte compare it "
    "with others; loss and perplexity are per token of its own."
)


@dataclass(frozen=True)
class ScoreBatches:
    """Score the samples `start` to `stop`, exclusive, of a text's validation split.

    Attributes:
        source: number of the text.
        untrained: score the model before its first step.
        counts_right: also count the targets that the likeliest token hits, which costs another forward pass.
    """

    source: int
    untrained: bool
    batch_size: int
    start: int
    stop: int
    counts_right: bool

    def run(self, host: Host) -> TaskResult:
        """Returns: the numbers of the documents that have targets there, and their sums."""
        split = host.split(self.source)
        batches = read_token_batches(split, self.batch_size, start=self.start, max_samples=self.stop)
        num_bytes = host.texts_tokenizer.token_num_bytes if host.is_text else None
        model = host.untrained if self.untrained else host.model
        with host.autocast():
            return score_batches(model, batches, self.start, host.documents(self.source), num_bytes, self.counts_right)


@dataclass(frozen=True)
class CompressDocuments:
    """`gzip -9` of the documents that the first `num_samples` samples hold, each alone, as files on a disk would be."""

    source: int
    num_samples: int

    def run(self, host: Host) -> TaskResult:
        """Returns: bits and bytes of each document. Needs no model."""
        place_n = host.documents(self.source).place_n
        split = host.split(self.source)
        num_documents = int((place_n < self.num_samples * split.index.format.seq_len).sum())
        sizes = []
        for _, ids in zip(range(num_documents), read_token_documents(split), strict=False):
            raw = host.texts_tokenizer.decode(ids)
            sizes.append((8 * len(gzip.compress(raw, compresslevel=9, mtime=0)), len(raw)))
        bits_n, bytes_n = np.array(sizes, np.float64).T
        return {"bits": bits_n, "bytes": bytes_n}


@dataclass(frozen=True)
class ScoreTexts:
    """Score documents of a text's validation split, by number, as text that a model with its own tokenizer reads.

    The end of each document is a target too, as in training.
    Attributes: window: tokens of the model that it reads at once; a longer document is cut, as it is for training.
    """

    source: int
    first: int
    last: int
    window: int

    def run(self, host: Host) -> TaskResult:
        """Returns: as score_batches; no answers are counted."""
        tokenizer = host.tokenizer
        documents = islice(read_token_documents(host.split(self.source)), self.first, self.last)
        raw = [host.texts_tokenizer.decode(ids) for ids in documents]
        encoded = tokenizer.encode_batch([text.decode("utf-8", "replace") for text in raw])
        texts = [Continuation(beginning(tokenizer), [*ids.tolist(), tokenizer.eod_id]) for ids in encoded]
        window = min(self.window, host.model.max_tokens or self.window)
        with host.autocast():
            logprobs = score_texts(host.model, texts, host.batch_tokens, window)
        return {
            "document": np.arange(self.first, self.first + len(raw)),
            "nll": -np.array(logprobs),
            "tokens": np.array([len(text.ids) for text in texts], float),
            "bytes": np.array([len(text) for text in raw], float),
            "right": np.zeros(len(raw)),
        }


def pieces_of_text(source: int, setting: Setting, num_samples: int, at_once: int) -> Iterator[ScoreTexts]:
    """The documents that the first `num_samples` samples hold, `at_once` at a time."""
    node = setting.tokens[source]
    seq_len = node.output.seq_len
    num_documents = int((all_documents(validation_split(node)).place_n < num_samples * seq_len).sum())
    for first in range(0, num_documents, at_once):
        yield ScoreTexts(source, first, min(first + at_once, num_documents), seq_len)


@torch.inference_mode()
def score_batches(
    model: LanguageModel,
    batches: Iterable[TokenBatch],
    first_sample: int,
    documents: Documents,
    token_num_bytes: np.ndarray | None,
    counts_right: bool = False,
) -> TaskResult:
    """Score consecutive batches of a split. The host reads the next batch while a GPU computes, and waits once.

    Args:
        first_sample: number of the first in the split.
        documents: of the split.
        token_num_bytes: bytes each token id stands for; None: they are no text.
        counts_right: also count the targets that the likeliest token hits.
    Returns: `document` n, numbers; and sums of each: `nll` in nats, `tokens`, `bytes`, `right`.
    """
    of_batches: list[tuple[torch.Tensor, torch.Tensor, np.ndarray]] = []  # nll and hits on the device; targets
    seq_len = 0
    for batch in batches:
        tokens_bt, targets_bt, doc_ids_bt, wanted_bt = batch.map(partial(copy_to, model.device))
        nll_bt = model.token_losses(tokens_bt, targets_bt, doc_ids_bt, wanted_bt)
        right_bt = torch.zeros_like(nll_bt, dtype=torch.bool)
        if counts_right:
            rows_s, columns_s = (copy_to(model.device, at_s) for at_s in (batch.targets_bt >= 0).nonzero().T)
            logits_sv = model.logits_at(tokens_bt, rows_s, columns_s, doc_ids_bt, wanted_bt)
            right_bt[rows_s, columns_s] = logits_sv.argmax(-1) == targets_bt[rows_s, columns_s]
        of_batches.append((nll_bt.flatten(), right_bt.flatten(), batch.targets_bt.flatten().numpy()))
        seq_len = tokens_bt.shape[1]
    nll_p = torch.cat([nll for nll, _, _ in of_batches]).cpu().numpy().astype(np.float64)
    right_p = torch.cat([right for _, right, _ in of_batches]).cpu().numpy()
    targets_p = np.concatenate([targets for _, _, targets in of_batches])
    (at_s,) = np.nonzero(targets_p >= 0)
    number_s = documents.of_places(first_sample * seq_len + at_s)
    sums = {
        "nll": nll_p[at_s],
        "tokens": np.ones(len(at_s)),
        "bytes": np.zeros(len(at_s)) if token_num_bytes is None else token_num_bytes[targets_p[at_s]],
        "right": right_p[at_s],
    }
    first = int(number_s.min(initial=0)) if len(number_s) == 0 else int(number_s[0])
    sums = {name: np.bincount(number_s - first, weights=values_s) for name, values_s in sums.items()}
    (has_targets,) = np.nonzero(sums["tokens"])
    return {"document": has_targets + first, **{name: values[has_targets] for name, values in sums.items()}}


def measured(name: str, setting: Setting, results: Mapping[str, TaskResult], baselines: Sequence[str]) -> Measured:
    """The figures of all texts together and of each. Raises: ValueError: there is no target at all."""
    texts = [_of_text(number, setting, results) for number in range(len(setting.tokens))]
    together = _Text(
        [name for text in texts for name in text.ids],
        {name: np.concatenate([text.sums[name] for text in texts]) for name in texts[0].sums},
    )
    if not together.sums["tokens"].sum():
        raise ValueError("no validation token to score: the validation split is empty.")
    ratios = together.ratios(setting, "model")
    figures = _figures(ratios, setting, is_main=True)
    if len(texts) > 1:
        for node, text in zip(setting.tokens, texts, strict=True):
            of_text = _figures(text.ratios(setting, "model"), setting, is_main=False)
            figures += [figure.model_copy(update={"name": f"{figure.name}/{node.name}"}) for figure in of_text]
    references = [
        figure_of(label, together.ratios(setting, label)["bits_per_byte"], unit="bits per byte") for label in baselines
    ]
    counted = "bytes" if setting.is_text else "tokens"
    units = Units(identity_of(list(together.ids), together.sums[counted]), ratios)
    return Measured(
        MeasureResult(
            name=name,
            kind="text",
            unit="document",
            num_units=len(together.ids),
            figures=tuple(figures),
            references=tuple(references),
            notes=_notes(setting, baselines),
        ),
        units,
    )


def _notes(setting: Setting, baselines: Sequence[str]) -> tuple[str, ...]:
    as_text = () if setting.reads_ids else (_AS_TEXT.format(setting.seq_len),)
    return (_VALIDATION, *as_text, *(_BASELINES[label] for label in baselines))


@dataclass(frozen=True)
class _Text:
    """Documents that were scored. `sums`: of each document, float64: `nll`, ..., `untrained`, `bits`, `gzip_bytes`."""

    ids: list[str]
    sums: Mapping[str, np.ndarray]

    def ratios(self, setting: Setting, model: str) -> dict[str, Ratio]:
        """By the figure's name."""
        sums = self.sums
        if model == "gzip -9":
            return {"bits_per_byte": Ratio(sums["gzip_bits"], sums["gzip_bytes"])}
        nll = sums["untrained" if model == "untrained" else "nll"]
        ratios = {"loss": Ratio(nll, sums["tokens"]), "perplexity": Ratio(nll, sums["tokens"])}
        if setting.is_text:
            ratios["bits_per_byte"] = Ratio(nll / math.log(2), sums["bytes"])
        if setting.has_loss_mask:
            ratios["accuracy"] = Ratio(sums["right"], sums["tokens"])
        return ratios


def _of_text(source: int, setting: Setting, results: Mapping[str, TaskResult]) -> _Text:
    documents = all_documents(validation_split(setting.tokens[source]))
    num_documents = len(documents.ids)
    sums = {name: np.zeros(num_documents) for name in (*_COLUMNS, "untrained", "gzip_bits", "gzip_bytes")}
    for key, result in results.items():
        of_source, what, *_ = key.split("-")
        if int(of_source) != source:
            continue
        if what == "gzip":
            sums["gzip_bits"][: len(result["bits"])] = result["bits"]
            sums["gzip_bytes"][: len(result["bytes"])] = result["bytes"]
            continue
        columns = _COLUMNS if what == "model" else ("nll",)
        for name in columns:
            sums[name if what == "model" else "untrained"][result["document"]] += result[name]
    (scored,) = np.nonzero(sums["tokens"])
    return _Text([documents.ids[n] for n in scored], {name: values[scored] for name, values in sums.items()})


def _figures(ratios: Mapping[str, Ratio], setting: Setting, is_main: bool) -> list[Figure]:
    figures = []
    if "accuracy" in ratios:
        source = setting.tokens[0].config.source
        chance = source.task.chance if isinstance(source, SyntheticSource) else None
        figures.append(figure_of("accuracy", ratios["accuracy"], better="higher", chance=chance, is_main=is_main))
    if "bits_per_byte" in ratios:
        figures.append(figure_of("bits_per_byte", ratios["bits_per_byte"], unit="bits per byte", is_main=is_main))
    figures.append(figure_of("loss", ratios["loss"], unit="nats per token", is_main=is_main))
    figures.append(figure_of("perplexity", ratios["perplexity"], "exp", is_main=is_main))
    return figures

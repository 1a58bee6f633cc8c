"""The work of the measure `position`: which stretches, their losses, the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from data.lineage import Documents, all_documents
from data.shards import read_stretch
from pipelines.stages.evaluate.measures.figures import figure_of, identity_of, point_of
from pipelines.stages.evaluate.measures.measure import Measured, Setting, Units
from pipelines.stages.evaluate.results import Curve, Mark, MeasureResult
from pipelines.stages.evaluate.validation import validation_split
from pipelines.stages.train.device import copy_to
from pipelines.stages.uncertainty import Ratio

if TYPE_CHECKING:
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.evaluate.language_model import LanguageModel
    from pipelines.stages.evaluate.measures.measure import TaskResult
    from pipelines.stages.evaluate.measures.position import PositionConfig


class Windows(NamedTuple):
    """Stretches to score.

    Attributes:
        num_tokens: of each.
        starts: by the number of the text, places of their first targets.
        bin_ends: bin i covers the positions from bin_ends[i-1] (0 at first) to bin_ends[i], exclusive.
    """

    num_tokens: int
    starts: Sequence[tuple[int, Sequence[int]]]
    bin_ends: tuple[int, ...]


def plan_windows(config: PositionConfig, setting: Setting) -> Windows | None:
    """Stretches of `multiple` training lengths, or as long as the documents allow; None: not one, or not measured.

    Round r takes the r-th stretch of every document, so that few documents do not make up all.
    """
    if setting.has_loss_mask or not setting.reads_ids:
        return None
    length = setting.training_seq_len
    texts = [all_documents(validation_split(node)) for node in setting.tokens]
    for multiple in range(config.multiple, 0, -1):
        find = packed_windows if config.packed else long_windows
        found = [find(text, multiple * length) for text in texts]
        if any(found):
            in_turn = [(source, start) for one in zip_longest(*found) for source, start in enumerate(one)]
            chosen = [(source, start) for source, start in in_turn if start is not None][: config.max_windows]
            starts = [(source, [start for of, start in chosen if of == source]) for source in range(len(texts))]
            return Windows(multiple * length, starts, tuple(position_bins(length, multiple * length)))
    return None


def long_windows(documents: Documents, window_tokens: int) -> list[int]:
    """Places at which a stretch within one document begins: those at the starts first, then further into them."""
    starts: list[int] = []
    for begin in range(0, int(documents.num_tokens_n.max(initial=0)) - window_tokens + 1, window_tokens):
        is_long = documents.num_tokens_n >= begin + window_tokens
        starts += (documents.place_n[is_long] + begin).tolist()
    return starts


def packed_windows(documents: Documents, window_tokens: int) -> list[int]:
    """Places at which a stretch of packed documents without padding begins, one behind the other."""
    end_n = documents.place_n + documents.num_tokens_n + 1
    padding_begins = np.append(end_n[:-1][end_n[:-1] < documents.place_n[1:]], end_n[-1])
    padding_ends = np.append(documents.place_n[1:][end_n[:-1] < documents.place_n[1:]], end_n[-1])
    starts: list[int] = []
    begin = 0
    for stop, following in zip(padding_begins.tolist(), padding_ends.tolist(), strict=True):
        starts += range(begin, stop - window_tokens + 1, window_tokens)
        begin = following
    return starts


def position_bins(seq_len: int, context_tokens: int, bins_per_seq_len: int = 8) -> list[int]:
    """Ends of equal bins up to `context_tokens`; a bin ends exactly at each multiple of the training length."""
    step = max(seq_len // bins_per_seq_len, 1)
    return sorted({*range(step, context_tokens + 1, step), *range(seq_len, context_tokens + 1, seq_len)})


@dataclass(frozen=True)
class ScoreWindows:
    """Score stretches of a text that begin with an empty memory, together.

    Attributes:
        source: number of the text.
        starts: places of their first targets.
        keeps_apart: they hold several documents.
    """

    source: int
    starts: tuple[int, ...]
    num_tokens: int
    bin_ends: tuple[int, ...]
    keeps_apart: bool

    def run(self, host: Host) -> TaskResult:
        """Returns: `nll` in nats of each stretch in each bin, (n, bins); `document`: the number of its first."""
        split, documents = host.split(self.source), host.documents(self.source)
        stretches = [read_stretch(split, start, start + self.num_tokens) for start in self.starts]
        doc_ids_nt = None
        if self.keeps_apart:
            places_nt = np.array(self.starts)[:, None] + np.arange(self.num_tokens)
            doc_ids_nt = documents.of_places(places_nt)
            doc_ids_nt -= doc_ids_nt[:, :1]
        with host.autocast():
            nll = score_by_position(
                host.model,
                np.stack([stretch.inputs_t for stretch in stretches]),
                np.stack([stretch.targets_t for stretch in stretches]),
                doc_ids_nt,
                self.bin_ends,
            )
        return {"nll": nll, "document": documents.of_places(np.array(self.starts))}


@torch.inference_mode()
def score_by_position(
    model: LanguageModel,
    inputs_nt: np.ndarray,
    targets_nt: np.ndarray,
    doc_ids_nt: np.ndarray | None,
    bin_ends: Sequence[int],
) -> np.ndarray:
    """Sum of the losses in each stretch of the context, of texts that begin with an empty memory.

    Args: doc_ids_nt: keep documents apart by these; None: each row is one.
    Returns: nats of each text in each bin, (n, bins).
    """
    arrays = [inputs_nt, targets_nt] if doc_ids_nt is None else [inputs_nt, targets_nt, doc_ids_nt]
    losses_nt = model.token_losses(*(copy_to(model.device, torch.from_numpy(array)) for array in arrays))
    nll_nt = losses_nt.double().cpu().numpy()
    bins = list(pairwise([0, *bin_ends]))
    return np.array([[nll_t[start:end].sum() for start, end in bins] for nll_t in nll_nt])


def measured(config: PositionConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
    """The curve over all stretches, and the loss within and beyond the training length.

    Units are documents, whose stretches are added up; of packed documents the stretches.
    """
    windows = plan_windows(config, setting)
    unit = "window" if config.packed else "document"
    if windows is None:
        return Measured(MeasureResult(name=config.called, kind="position", unit=unit, num_units=0))
    length, bin_ends = setting.training_seq_len, np.array(windows.bin_ends)
    sources = np.concatenate([np.full(len(result["nll"]), int(key.split("-")[0])) for key, result in results.items()])
    document_w = np.concatenate([result["document"] for result in results.values()])
    nll_wb = np.concatenate([result["nll"] for result in results.values()])
    places = np.array([start for _, starts in windows.starts for start in starts])
    tokens_wb = np.tile(np.diff([0, *bin_ends]), (len(nll_wb), 1))
    if config.packed:
        names: list[list[int]] = np.stack([sources, places], 1).tolist()
        nll_ub, tokens_ub = nll_wb, tokens_wb
    else:
        pairs, unit_w = np.unique(np.stack([sources, document_w], 1), axis=0, return_inverse=True)
        names = pairs.tolist()
        nll_ub, tokens_ub = (_added(values, unit_w.reshape(-1), len(pairs)) for values in (nll_wb, tokens_wb))

    def ratio(is_in: np.ndarray) -> Ratio:
        return Ratio(nll_ub[:, is_in].sum(1), tokens_ub[:, is_in].sum(1).astype(np.float64))

    ratios = {"loss_within": ratio(bin_ends <= length)}
    if windows.num_tokens > length:
        ratios["loss_beyond"] = ratio(bin_ends > length)
    note = f"Mean over {len(nll_wb)} stretches of "
    note += "packed validation documents, kept apart" if config.packed else f"{len(names)} long validation documents"
    note += ", each started with an empty memory."
    if windows.num_tokens < config.multiple * length:
        note += f" No document is long enough for more than {windows.num_tokens:,} tokens."
    curve = Curve(
        name="perplexity_by_position",
        title="Perplexity by position in the context",
        x_label="position (tokens)",
        y_label="perplexity",
        points=tuple(
            point_of(end, ratio(bin_ends == end), "exp") for end in windows.bin_ends
        ),
        mark=Mark(x=length, label="training length"),
        note=note,
    )  # fmt: skip
    return Measured(
        MeasureResult(
            name=config.called,
            kind="position",
            unit=unit,
            num_units=len(names),
            figures=tuple(figure_of(name, of, unit="nats per token") for name, of in ratios.items()),
            curves=(curve,),
        ),
        Units(identity_of([node.output.valid_sha256 for node in setting.tokens], names, windows.num_tokens), ratios),
    )


def _added(values_wb: np.ndarray, unit_w: np.ndarray, num_units: int) -> np.ndarray:
    sums_ub = np.zeros((num_units, values_wb.shape[1]))
    np.add.at(sums_ub, unit_w, values_wb)
    return sums_ub

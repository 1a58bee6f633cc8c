"""The document canary: nothing of a document may reach the losses of another one in the same row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from base.errors import UserError
from data.shards import TokenBatch
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import autocast, copy_to
from pipelines.stages.train.guards.incidents import Incidents
from pipelines.stages.train.trainer import Trainer, to_device

_NOISE = 4.0  # times the difference between two equal forward passes, which is 0 with deterministic operators


class DocumentCanary:
    """Changes the tokens of a row's first document and looks at the losses of the others. Every method: a collective.

    A check is two forward passes of one row. It is due at the first batch in which some rank has a row of two
    documents, looked for where `is_look` says so, and again after `every_steps`.
    """

    def __init__(self, trainer: Trainer, config: TrainStageConfig, incidents: Incidents) -> None:
        self._trainer, self._incidents = trainer, incidents
        self._every_steps, self._autocast_bf16 = config.check_documents_every_steps, config.autocast_bf16
        self._due_at = 0

    def check(self, step: int, micro_batches: Sequence[TokenBatch], is_look: bool) -> None:
        """Check the batch of a step, if that is due. Raises: UserError: something leaks."""
        if self._every_steps is None or step < self._due_at or not is_look:
            return
        row = next((row for batch in micro_batches if (row := _row_of_documents(batch)) is not None), None)
        someone_has_one = torch.tensor(int(row is not None), device=self._trainer.exact_device)
        dist.all_reduce(someone_has_one, dist.ReduceOp.MAX)
        if not someone_has_one.item():
            return
        self._due_at = step + self._every_steps
        if row is None:  # the forward passes are collectives under ZeRO 3
            row = micro_batches[0].map(lambda tensor: tensor[:1])
        self._check_row(step, row)

    def _check_row(self, step: int, row: TokenBatch) -> None:
        is_first = row.doc_ids_bt == row.doc_ids_bt[:, :1]
        is_other = copy_to(self._trainer.exact_device, ~is_first & (row.doc_ids_bt >= 0))
        other_ids = (row.tokens_bt + 1) % self._trainer.model.embedding.num_embeddings
        changed = row._replace(tokens_bt=torch.where(is_first, other_ids, row.tokens_bt))
        losses = self._trainer.token_losses(row)
        largest = _largest(losses, self._trainer.token_losses(changed), is_other)
        if not largest:
            return
        noise = _largest(losses, self._trainer.token_losses(row), is_other)
        if largest <= _NOISE * noise:
            return
        layer = self._layer(row, changed, is_other)
        message = (
            f"Documents leak at step {step}: other tokens in the first document of a row changed losses in the next "
            f"ones by up to {largest:.3g} nats, {f'first seen after {layer}' if layer else 'in a layer not found'}. "
            "The operator that it uses (tags bmojo.path.*) is wrong for packed documents. Try BMOJO_KERNELS=torch, and "
            "report it; null in train.check_documents_every_steps trains all the same."
        )
        self._incidents.add("documents", step, message, largest=str(largest), layer=layer)
        raise UserError(message)

    def _layer(self, row: TokenBatch, changed: TokenBatch, is_other: torch.Tensor) -> str | None:
        """The first layer after which the other documents differ, as `layer 3 (mamba2)`; None where none do."""
        before, after = (self._hidden(batch) for batch in (row, changed))
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            if _largest(one.float(), other.float(), is_other[..., None]):
                mixers = self._trainer.model.config.mixers
                return f"layer {number - 1} ({mixers[number - 1]})" if number else "the embedding"
        return None

    @torch.no_grad()
    def _hidden(self, batch: TokenBatch) -> list[torch.Tensor]:
        tokens_bt, _, doc_ids_bt, wanted_bt = to_device(batch, self._trainer.device)
        with autocast(self._trainer.device, self._autocast_bf16):
            hidden: list[torch.Tensor] = self._trainer.model(
                tokens_bt, doc_ids_bt=doc_ids_bt, return_hidden=True, wanted_bt=wanted_bt
            )[-1]
        return [each.to(self._trainer.exact_device) for each in hidden]


def _row_of_documents(batch: TokenBatch) -> TokenBatch | None:
    """A row, as a batch, with targets in a document that is not its first one; None where there is none."""
    is_other = (batch.doc_ids_bt != batch.doc_ids_bt[:, :1]) & (batch.doc_ids_bt >= 0) & (batch.targets_bt >= 0)
    rows = is_other.any(dim=1).nonzero().flatten().tolist()
    return batch.map(lambda tensor: tensor[rows[0] : rows[0] + 1]) if rows else None


def _largest(one: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> float:
    """Largest absolute difference on any rank, NaN against a number counting as infinite. A collective."""
    gap = torch.where(where & (one != other), (one - other).abs(), 0.0).nan_to_num(nan=torch.inf).max()
    dist.all_reduce(gap, dist.ReduceOp.MAX)
    return float(gap)

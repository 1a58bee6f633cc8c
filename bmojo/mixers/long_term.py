"""What an eidetic layer reads of documents that were read long before, while it decodes (docs/design/0063).

Their tokens are further slots: seen at the constant distance of the layer's own slots, under the one softmax that also
reads window, fading memory and slots.

Shapes: n documents, m tokens of each, d documents that a query reads, g key/value heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory_attention import KeysValues, Slots, StepInputs, memory_attention_step

NEVER = float("-inf")


class EideticTokens(NamedTuple):
    """Tokens that one layer kept verbatim, of n documents."""

    k_nmgp: Tensor  # not rotated
    v_nmgp: Tensor
    position_nm: Tensor  # in the document; -1: there is no token

    @property
    def is_token_nm(self) -> Tensor:
        return self.position_nm >= 0


class ExactIndex:
    """How near documents are to queries, by the layer's own keys: each key is looked at.

    A document is as near as the share of attention that it would get if a query read all documents and nothing else.
    """

    def __init__(self, tokens: EideticTokens) -> None:
        self._k_gpl = tokens.k_nmgp.flatten(0, 1).permute(1, 2, 0)  # a view: keys are most of what is held
        self._is_token_nm = tokens.is_token_nm

    def shares(self, q_bhp: Tensor, hidden_bn: Tensor) -> Tensor:
        """share_bn, float32 at least, mean over heads. Documents that are hidden from a row, or empty, have 0.

        Args: q_bhp: queries, rotated for the distance of slots.
        """
        b, h, p = q_bhp.shape
        g = self._k_gpl.shape[0]
        q_gbp = (q_bhp * p**-0.5).view(b, g, h // g, p).transpose(0, 1).flatten(1, 2)  # b r queries of each group
        score_gbl = q_gbp @ self._k_gpl.to(q_bhp.dtype)  # one product per group, whatever the rows: keys are not copied
        score_bhl = score_gbl.unflatten(1, (b, h // g)).transpose(0, 1).flatten(1, 2)
        score_bhl = score_bhl.to(torch.promote_types(q_bhp.dtype, torch.float32))
        score_bhl.masked_fill_(~self._is_token_nm.flatten(), NEVER)
        log_sum_bhn = score_bhl.unflatten(-1, self._is_token_nm.shape).logsumexp(-1)
        return log_sum_bhn.masked_fill(hidden_bn[:, None], NEVER).softmax(-1).nan_to_num(0.0).mean(1)


class LongTermReader:
    """Documents as the rows of one batch read them in one layer: at each step, those nearest to the step's query.

    Attributes:
        attention_bn: attention that each document got, mean over heads, summed over the steps.
        hidden_bn: documents that a row does not read, because its decoding state holds them.
    """

    def __init__(
        self, tokens: EideticTokens, index: ExactIndex, log_weight_n: Tensor, num_rows: int, num_read: int
    ) -> None:
        """Args: log_weight_n: added to the log of how near documents are.
        num_read: documents read at a step [d], at most n, and at most the channels of a head, which count attention.
        """
        n, m, g, p = tokens.k_nmgp.shape
        self._tokens, self._index, self._log_weight_n, self._num_read = tokens, index, log_weight_n, num_read
        device = tokens.k_nmgp.device
        self.hidden_bn = torch.zeros(num_rows, n, dtype=torch.bool, device=device)
        self.attention_bn = torch.zeros(num_rows, n, device=device)
        mark_dmgp = torch.zeros(self._num_read, m, g, p, dtype=tokens.v_nmgp.dtype, device=device)
        for document in range(self._num_read):
            mark_dmgp[document, ..., document] = 1
        self._mark_mgp = mark_dmgp.flatten(0, 1)

    def attend(self, inputs: StepInputs) -> Tensor:
        """The step of an eidetic layer, which reads the nearest documents too."""
        slots = inputs.eidetic
        assert slots is not None
        near_bd, is_near_bd = self._nearest(slots.q_bhp)
        both = self._beside(slots, near_bd, is_near_bd)
        out_bhp = memory_attention_step(*inputs._replace(eidetic=both))
        self._count(inputs, slots, both, near_bd)
        return out_bhp

    def _nearest(self, q_bhp: Tensor) -> tuple[Tensor, Tensor]:
        """Documents of each row, and whether they are read at all."""
        share_bn = self._index.shares(q_bhp, self.hidden_bn)
        rank_bn = share_bn.log() + self._log_weight_n.to(share_bn.dtype)
        rank_bd, near_bd = rank_bn.topk(self._num_read)
        return near_bd, rank_bd > NEVER

    def _beside(self, slots: Slots, near_bd: Tensor, is_near_bd: Tensor) -> Slots:
        """The layer's slots, and behind them the tokens of these documents."""
        k, v, position_nm = self._tokens
        position_bm = torch.where(is_near_bd[..., None], position_nm[near_bd], -1).flatten(1)
        return Slots(
            slots.q_bhp,
            torch.cat([slots.k_bmhp, k[near_bd].flatten(1, 2)], 1),
            torch.cat([slots.v_bmhp, v[near_bd].flatten(1, 2)], 1),
            torch.cat([slots.position_bm, position_bm], 1),
        )

    def _count(self, inputs: StepInputs, slots: Slots, both: Slots, near_bd: Tensor) -> None:
        """Attention is linear in the values: values that mark documents give each one's share."""
        num_rows, num_slots = slots.position_bm.shape
        mark_bmgp = self._mark_mgp.expand(num_rows, -1, -1, -1)
        no_mark_bmgp = mark_bmgp.new_zeros(num_rows, num_slots, *mark_bmgp.shape[2:])
        fading = inputs.fading
        marked = inputs._replace(
            v_brhp=torch.zeros_like(inputs.v_brhp),
            fading=None if fading is None else KeysValues(fading.k, torch.zeros_like(fading.v)),
            eidetic=both._replace(v_bmhp=torch.cat([no_mark_bmgp, mark_bmgp], 1)),
        )
        share_bd = memory_attention_step(*marked).mean(1)[:, : self._num_read]
        self.attention_bn.scatter_add_(1, near_bd, share_bd.to(self.attention_bn.dtype))

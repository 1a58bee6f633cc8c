"""B'MOJO (arXiv:2407.06324): one attention over verbatim, fading and eidetic memory (docs/model.md).

- fading memory: a state-space model summarises the unbounded past in y
- eidetic memory: tokens whose y the past predicts badly are kept verbatim (innovation selection)
- one softmax reads the window (keys and values of u), the fading memory (of y, beyond the window) and the kept tokens
- with fading_output: memory_and_residual, gain * y is added to what attention gives (docs/design/0044)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.config import ModelConfig
from bmojo.layers import Linear, RotaryTable
from bmojo.mixers import ring
from bmojo.mixers.attention import Projections
from bmojo.mixers.base import LayerMemory, Mixer, MixerOutput, Sequence
from bmojo.mixers.innovation import LOWEST, InnovationScore, position_in_document, random_rank
from bmojo.mixers.mamba2 import Mamba2
from bmojo.state import LayerState
from kernels.innovation_select import innovation_select, keep_best
from kernels.memory_attention import (
    AttentionInputs,
    Eidetic,
    KeysValues,
    Slots,
    attention_mass,
    memory_attention,
    memory_attention_step,
)
from kernels.pointwise import branch

INITIAL_GAIN = 0.35  # of y in the layer's output; y has the scale of u


@dataclass(frozen=True)
class Rows:
    """What attention can read. The last t rows of each are the positions of the piece at hand (of the fading memory's
    the first of them, where the last are not needed); earlier rows come from the decoding state: past positions and, in
    front of `k`, `v`, `log_e` and `position`, the eidetic slots."""

    k: Tensor  # before RoPE, for the eidetic set
    v: Tensor
    near_k: Tensor  # rotated to their positions, for the window
    near_v: Tensor
    fading_k: Tensor
    fading_v: Tensor
    log_e: Tensor | None = None  # innovation scores and positions, where there is an eidetic set
    position: Tensor | None = None
    num_slots: int = 0


class BMojo(Mixer):
    """Without an eidetic set (num_eidetic 0) this is B'MOJO-F."""

    def __init__(self, config: ModelConfig, num_eidetic: int) -> None:
        super().__init__(config)
        self.num_eidetic = num_eidetic
        self.projections = Projections(config)
        self.fading_kv_proj: Linear | None = None
        if config.fading_projections == "separate":
            kv_proj = self.projections.kv_proj
            self.fading_kv_proj = Linear(kv_proj.in_features, kv_proj.out_features)
        self.ssm = Mamba2(config, config.fading_expand)
        self.innovation = InnovationScore(config) if num_eidetic else None
        self.out_proj = Linear(config.num_heads * config.attention_head_dim, config.d_model)
        self.fading_gain = nn.Parameter(torch.empty(config.d_model)) if config.adds_fading_output else None

    def init_gain(self) -> None:
        """Set the gain of y; see the table in bmojo.model."""
        if self.fading_gain is not None:
            nn.init.constant_(self.fading_gain, INITIAL_GAIN)

    def forward(self, u_btd: Tensor, sequence: Sequence, state: LayerState | None = None) -> MixerOutput:
        assert sequence.rotary is not None
        config, start, t = self.config, sequence.start, sequence.num_tokens
        past = sequence.first(self._num_fading(sequence, state))  # later tokens stay in every query's window
        assert past.rotary is not None
        read_by_ssm = past if self.fading_gain is None else sequence
        for_q_btd, for_kv_btd, for_ssm_btd = branch(u_btd, (t, t, read_by_ssm.num_tokens))
        all_y_btd = self.ssm(for_ssm_btd, read_by_ssm, None if state is None else ssm_state(state)).out_btd
        y_btd = first_rows(all_y_btd, past.num_tokens)
        q_bthp = self.projections.queries(for_q_btd)
        near_k, k, v = self.projections.keys_values(for_kv_btd, sequence.rotary)
        fading_k, _, fading_v = self.projections.keys_values(y_btd, past.rotary, self.fading_kv_proj)
        rows = Rows(k, v, near_k, v, fading_k, fading_v)
        innovation_bt = predictor_loss = None
        if self.innovation is not None:
            past_y = None if state is None else state["y"]
            innovation_bt, errors_bt = self.innovation(y_btd, past_y, past.doc_ids_bt)
            predictor_loss = errors_bt.mean() if errors_bt.requires_grad else None
            position_bt = torch.arange(start, start + t, device=u_btd.device).expand(u_btd.shape[0], -1)
            in_document = position_bt if sequence.doc_ids_bt is None else position_in_document(sequence.doc_ids_bt)
            log_e = self._rank(innovation_bt, in_document[:, : past.num_tokens])
            log_e = F.pad(log_e, (0, t - past.num_tokens))  # these do not leave the window of any query here
            rows = replace(rows, log_e=log_e, position=position_bt)
        if state is not None:
            rows = self._behind_past(rows, state, start)

        eidetic, index_bjm = None, None
        if rows.log_e is not None and rows.position is not None:
            index_bjm = innovation_select(
                rows.log_e, rows.position, num_queries=t, chunk_size=config.chunk_size, start=start,
                window_size=config.window_size, num_eidetic=self.num_eidetic, tau=config.innovation_tau,
                doc_ids_bs=sequence.doc_ids_bt, num_slots=rows.num_slots,
            )  # fmt: skip
            q_near, q_far = sequence.rotary.rotate_both(q_bthp, config.window_size)  # slots are seen at distance W
            eidetic = Eidetic(q_far, rows.k, rows.v, index_bjm)
        else:
            q_near = sequence.rotary.rotate(q_bthp)
        num_read = max(rows.fading_k.shape[1] + t - past.num_tokens - config.window_size, 1)
        attended = AttentionInputs(
            q_near,
            rows.near_k,
            rows.near_v,
            KeysValues(first_rows(rows.fading_k, num_read), first_rows(rows.fading_v, num_read)),
            eidetic,
            window_size=config.window_size,
            chunk_size=config.chunk_size,
            doc_ids_bt=sequence.doc_ids_bt,
            num_past=start,
        )
        out_bthp = memory_attention(*attended)
        memory = None
        if sequence.return_memory:
            mass_bt3 = attention_mass(attended)
            memory = LayerMemory(innovation_bt, positions_of(index_bjm, rows.position), mass_bt3)
        if state is not None:
            self._remember(rows, y_btd, index_bjm, state, start + t)
        return MixerOutput(self._output(out_bthp, all_y_btd), predictor_loss, memory)

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable | None, state: LayerState) -> Tensor:
        assert rotary is not None
        y_bd = self.ssm.step(u_bd, position_b, rotary, ssm_state(state))
        q_bhp = self.projections.queries(u_bd)
        near_k, k, v = self.projections.keys_values(u_bd, rotary)
        fading_k, _, fading_v = self.projections.keys_values(y_bd, rotary, self.fading_kv_proj)
        new = {"k": near_k, "v": v, "fk": fading_k, "fv": fading_v}
        if self.innovation is not None:
            new["plain_k"] = k
            innovation_b1, _ = self.innovation(y_bd[:, None], state["y"])
            new["log_e"] = self._rank(innovation_b1[:, 0], position_b)
            state["y"].copy_(torch.cat([state["y"][:, 1:], y_bd[:, None].to(state["y"].dtype)], 1))
        ring.write(state, position_b, new)
        eidetic = None
        if self.innovation is None:
            q_near = rotary.rotate(q_bhp)
        else:
            if bool((position_b % self.config.chunk_size == 0).any()):
                self._update_slots(state, position_b)
            q_near, q_far = rotary.rotate_both(q_bhp, self.config.window_size)
            eidetic = Slots(q_far, state["slot_k"], state["slot_v"], state["slot_position"])
        out_bhp = memory_attention_step(
            q_near,
            state["k"],
            state["v"],
            position_b,
            KeysValues(state["fk"], state["fv"]),
            eidetic,
            window_size=self.config.window_size,
        )
        return self._output(out_bhp, y_bd)

    def _output(self, attention_hp: Tensor, y_d: Tensor) -> Tensor:
        """out_proj(attention), and gain * y where y is added; leading dimensions alike."""
        out_d = self.out_proj(attention_hp.flatten(-2))
        return out_d if self.fading_gain is None else torch.addcmul(out_d, y_d, self.fading_gain.to(y_d.dtype))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        config = self.config
        kv = (self.projections.kv_heads, self.projections.head_dim)
        precise = torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

        recent = config.window_size + (config.chunk_size if self.innovation is not None else 0)
        state = {f"ssm.{name}": x for name, x in self.ssm.init_state(batch_size, device, dtype).items()}
        sizes = {"k": recent, "v": recent, "fk": 2 * config.window_size, "fv": 2 * config.window_size}
        state |= {name: ring.zeros(batch_size, size, *kv, dtype, device) for name, size in sizes.items()}
        if self.innovation is not None:
            slots = self.num_eidetic
            state["plain_k"] = ring.zeros(batch_size, recent, *kv, dtype, device)  # before RoPE, as slots hold them
            state |= {name: ring.zeros(batch_size, slots, *kv, dtype, device) for name in ("slot_k", "slot_v")}
            state |= {"slot_log_e": zeros(slots, dtype=precise), "log_e": zeros(recent, dtype=precise)}
            state["slot_position"] = torch.full((batch_size, slots), -1, dtype=torch.long, device=device)
            state["y"] = zeros(config.innovation_taps, config.d_model)
        return state

    def _num_fading(self, sequence: Sequence, state: LayerState | None) -> int:
        """How many tokens need a y: all, where the state, an inspection or a predictor's loss has a use for them."""
        if state is not None or sequence.return_memory:
            return sequence.num_tokens
        learned = self.innovation is not None and self.innovation.predictor is not None
        return self.config.fading_positions(sequence.num_tokens, learned)

    def _rank(self, innovation: Tensor, position: Tensor) -> Tensor:
        if self.config.selection == "random":
            return random_rank(position).to(innovation.dtype)
        return innovation.clamp_min(LOWEST).log()

    def _behind_past(self, rows: Rows, state: LayerState, start: int) -> Rows:
        """Put what the state holds in front of the new rows."""
        past_k, past_v = ring.in_order(state["k"], start), ring.in_order(state["v"], start)
        near_k, near_v = torch.cat([past_k, rows.near_k], 1), torch.cat([past_v, rows.near_v], 1)
        fading_k = torch.cat([ring.in_order(state["fk"], start), rows.fading_k], 1)
        fading_v = torch.cat([ring.in_order(state["fv"], start), rows.fading_v], 1)
        rows = replace(rows, near_k=near_k, near_v=near_v, fading_k=fading_k, fading_v=fading_v)
        if rows.log_e is None or rows.position is None:
            return rows
        past = torch.arange(start - past_k.shape[1], start, device=past_k.device)
        return replace(
            rows,
            k=torch.cat([state["slot_k"], ring.in_order(state["plain_k"], start), rows.k], 1),
            v=torch.cat([state["slot_v"], near_v], 1),
            log_e=torch.cat([state["slot_log_e"], ring.in_order(state["log_e"], start), rows.log_e], 1),
            position=torch.cat([state["slot_position"], past.expand(past_k.shape[0], -1), rows.position], 1),
            num_slots=state["slot_k"].shape[1],
        )

    def _remember(self, rows: Rows, y_btd: Tensor, index_bjm: Tensor | None, state: LayerState, end: int) -> None:
        """Leave the state as after position end - 1."""
        for name, value in (("k", rows.near_k), ("v", rows.near_v), ("fk", rows.fading_k), ("fv", rows.fading_v)):
            ring.refill(state[name], value, end)
        if index_bjm is None or rows.log_e is None or rows.position is None:
            return
        ring.refill(state["plain_k"], rows.k, end)
        ring.refill(state["log_e"], rows.log_e, end)
        state["y"].copy_(torch.cat([state["y"], y_btd.to(state["y"].dtype)], 1)[:, -state["y"].shape[1] :])
        last_bm = index_bjm[:, -1]
        self._set_slots(state, last_bm.clamp_min(0), last_bm >= 0, rows.k, rows.v, rows.log_e, rows.position)

    def _update_slots(self, state: LayerState, position_b: Tensor) -> None:
        """Merge what left the window since the last update into the slots of the rows that begin a chunk."""
        size = state["k"].shape[1]
        left_bc = position_b[:, None] - size + 1 + torch.arange(self.config.chunk_size, device=position_b.device)
        batch = torch.arange(position_b.shape[0], device=position_b.device)[:, None]
        at_bc = left_bc % size
        k = torch.cat([state["slot_k"], state["plain_k"][batch, at_bc]], 1)
        v = torch.cat([state["slot_v"], state["v"][batch, at_bc]], 1)
        log_e = torch.cat([state["slot_log_e"], state["log_e"][batch, at_bc]], 1)
        position = torch.cat([state["slot_position"], left_bc], 1)
        begins_b1 = position_b[:, None] % self.config.chunk_size == 0
        best_bm = keep_best(log_e, position, position >= 0, self.num_eidetic, self.config.innovation_tau)
        kept_bm = torch.where(begins_b1, best_bm, torch.arange(self.num_eidetic, device=best_bm.device))
        self._set_slots(state, kept_bm, position.gather(1, kept_bm) >= 0, k, v, log_e, position)

    @staticmethod
    def _set_slots(
        state: LayerState, rows_bm: Tensor, full_bm: Tensor, k: Tensor, v: Tensor, log_e: Tensor, position: Tensor
    ) -> None:
        batch = torch.arange(rows_bm.shape[0], device=rows_bm.device)[:, None]
        state["slot_k"].copy_(k[batch, rows_bm])
        state["slot_v"].copy_(v[batch, rows_bm])
        state["slot_log_e"].copy_(log_e[batch, rows_bm])
        state["slot_position"].copy_(torch.where(full_bm, position[batch, rows_bm], -1))


def first_rows(x_bs: Tensor, num_rows: int) -> Tensor:
    """A view; the tensor itself where it has no more, whose gradient then needs no copy."""
    return x_bs if x_bs.shape[1] == num_rows else x_bs[:, :num_rows]


def ssm_state(state: LayerState) -> LayerState:
    """The part of the state that belongs to the SSM; the tensors are shared."""
    return {name.removeprefix("ssm."): x for name, x in state.items() if name.startswith("ssm.")}


def positions_of(index_bjm: Tensor | None, position_bs: Tensor | None) -> Tensor | None:
    if index_bjm is None or position_bs is None:
        return None
    batch = torch.arange(index_bjm.shape[0], device=index_bjm.device)[:, None, None]
    return torch.where(index_bjm >= 0, position_bs[batch, index_bjm.clamp_min(0)], -1)

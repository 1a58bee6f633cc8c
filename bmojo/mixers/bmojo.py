"""B'MOJO (arXiv:2407.06324): one attention over verbatim, fading and eidetic memory (docs/model.md).

- fading memory: a state-space model summarises the unbounded past in y
- eidetic memory: tokens whose y the past predicts badly are kept verbatim (selection.py has this rule and others)
- one softmax reads the window (keys and values of u), the fading memory (of y, beyond the window) and the kept tokens
- with fading_output: memory_and_residual, gain * y is added to what attention gives (docs/design/0044)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.layers import Linear, RotaryTable, first, project_each, rows_for
from bmojo.mixers.attention import Projections, RingCache, mean_keys
from bmojo.mixers.base import LayerMemory, LengthRule, Mixer, MixerCounts, MixerOutput, Sequence
from bmojo.mixers.eidetic import Candidates, EideticState
from bmojo.mixers.fading import FADING
from bmojo.mixers.innovation import InnovationScore
from bmojo.mixers.long_term import LongTermReader
from bmojo.mixers.selection import RULES, Evidence, Innovation
from bmojo.mixers.ssm import SSMState
from bmojo.state import LayerState
from kernels.innovation_select import innovation_select
from kernels.memory_attention import (
    AttentionInputs,
    Eidetic,
    Slots,
    StepInputs,
    attention_mass,
    memory_attention,
    memory_attention_step,
)
from kernels.memory_attention import KeysValues as FadingRows
from kernels.memory_write import Rings, memory_write


@dataclass
class BMojoState(LayerState):
    """What each of the three memories keeps, and the SSM."""

    ssm: SSMState
    window: RingCache  # of the last W tokens, or of W + C with an eidetic memory, which enter its slots when they leave
    fading: RingCache  # of the last 2 W
    eidetic: EideticState | None

    def rings(self) -> Rings:
        """What a token's keys and values are written to."""
        plain_k = None if self.eidetic is None else self.eidetic.k
        return Rings(self.window.k, self.window.v, plain_k, self.fading.k, self.fading.v)


class BMojo(Mixer[BMojoState]):
    """Without eidetic slots (num_eidetic 0) this is B'MOJO-F."""

    IS_EIDETIC = True

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.num_slots = self.slots(config)
        self.rule = RULES[config.selection]
        self.projections = Projections(config)
        self.fading_kv_proj: Linear | None = None
        if config.fading_projections == "separate":
            self.fading_kv_proj = Linear(config.d_model, Projections.kv_width(config), config.init_std)
        self.ssm = FADING[config.fading_ssm](config)
        self.innovation = InnovationScore(config) if self.num_slots else None
        self.out_proj = Linear(Projections.query_width(config), config.d_model, config.residual_std)
        self.fading_gain = nn.Parameter(torch.empty(config.d_model)) if config.adds_fading_output else None
        self.long_term: LongTermReader | None = None  # documents that `step` reads too: see bmojo.long_term

    @classmethod
    def slots(cls, config: ModelFields) -> int:
        """Number of eidetic slots [M]."""
        assert isinstance(config.num_eidetic, int), "mixers are built from ModelConfig.of_layer"
        return config.num_eidetic if cls.IS_EIDETIC else 0

    @classmethod
    def learns_predictor(cls, config: ModelFields) -> bool:
        """Whether an innovation predictor takes its loss from y."""
        return cls.slots(config) > 0 and config.innovation_predictor == "learned"

    @classmethod
    def readable_positions(cls, config: ModelFields, num_tokens: int) -> int:
        """Positions of a whole sequence whose y makes fading keys, values and scores: queries read them beyond their
        window, so not the last window_size; at least one, so that parameters have a gradient; all for a predictor."""
        return num_tokens if cls.learns_predictor(config) else max(num_tokens - config.window_size, 1)

    @classmethod
    def check(cls, config: ModelFields) -> None:
        Projections.check(config)
        FADING[config.fading_ssm].check(config)
        if not cls.IS_EIDETIC:
            return
        RULES[config.selection].check(config)
        if config.chunk_size > config.window_size:
            raise ValueError(
                f"chunk_size={config.chunk_size} exceeds window_size={config.window_size}: a token would leave the "
                "window before the eidetic set is next updated. Set chunk_size to window_size or less."
            )

    @classmethod
    def length_rule(cls, config: ModelFields) -> LengthRule | None:
        return LengthRule("chunk_size", config.chunk_size) if cls.IS_EIDETIC else None

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        """The SSM counts as far as y is used. A rule that reads the SSM's errors runs its scan a second time."""
        d, queries, keys_values = config.d_model, Projections.query_width(config), Projections.kv_width(config)
        ssm = FADING[config.fading_ssm].counts(config, seq_len)
        params = {"attention": Projections.num_params(config) + queries * d, **ssm.params}
        if config.fading_projections == "separate":
            params["attention"] += d * keys_values
        if config.adds_fading_output:
            params["fading_gain"] = d
        if cls.learns_predictor(config):
            params["innovation"] = config.innovation_taps * d
        readable = cls.readable_positions(config, seq_len) / seq_len
        scanned = 1.0 if config.adds_fading_output else readable
        keys = mean_keys(seq_len, 2 * config.window_size)
        if cls.IS_EIDETIC:
            keys += mean_eidetic(cls.slots(config), config, seq_len)
        flops = {
            "attention_projections": 2.0 * (d * (2 * queries + keys_values) + readable * d * keys_values),
            "attention": 4.0 * queries * keys,
            **{part: scanned * amount for part, amount in ssm.flops.items()},
        }
        if cls.slots(config) and RULES[config.selection].READS == "delta_error":
            scan = sum(amount for part, amount in ssm.flops.items() if not part.endswith("projections"))
            flops["selection"] = readable * scan
        state_bytes = ssm.state_bytes + cls._memory_bytes(config) + Projections.tail_bytes(config)
        return MixerCounts(params, flops, state_bytes)

    @classmethod
    def _memory_bytes(cls, config: ModelFields) -> int:
        keys_values, slots = Projections.kv_width(config), cls.slots(config)
        fading = 4 * 2 * config.window_size * keys_values
        if not slots:
            return fading + 4 * config.window_size * keys_values
        recent = config.window_size + config.chunk_size
        outputs = RULES[config.selection].outputs_kept(config) * config.d_model
        scores = 4 * (slots + recent) + 8 * slots + 4 * outputs
        plain_keys = 4 * recent * keys_values // 2
        return fading + 4 * (recent + slots) * keys_values + plain_keys + scores

    def init_weights(self, generator: torch.Generator) -> None:
        """See the table in bmojo.model."""
        self.ssm.init_weights(generator)
        self.projections.init_weights()
        if self.fading_gain is not None:
            nn.init.constant_(self.fading_gain, self.config.fading_gain)
        if self.innovation is not None:
            self.innovation.init_predictor()

    def forward(self, u_btd: Tensor, sequence: Sequence, state: BMojoState | None = None) -> MixerOutput:
        assert self.long_term is None, "documents are read by `step`, token by token"
        config, start, t = self.config, sequence.start, sequence.num_tokens
        readable = sequence.first(self._num_readable(sequence, state))  # later tokens stay in every query's window
        scanned = readable if self.fading_gain is None else sequence
        u_for_q, u_for_kv, u_for_ssm = rows_for(u_btd, (t, t, scanned.num_tokens))
        asked = replace(scanned, delta_error=self._reads_errors)
        from_ssm = self.ssm(u_for_ssm, asked, None if state is None else state.ssm)
        all_y_btd = from_ssm.out_btd
        y_btd = first(all_y_btd, readable.num_tokens)
        tails = None if state is None else state.window.conv
        q_bthp = self.projections.queries(u_for_q, sequence, tails)

        # The window: keys and values of u
        window, plain_k = self.projections.keys_values(u_for_kv, sequence, tails)
        # The fading memory: keys and values of y
        fading = self.projections.fading_keys_values(y_btd, readable, self.fading_kv_proj)
        # The eidetic memory: keys and values of u, kept by the selection rule
        candidates = innovation_bt = predictor_loss = None
        if self.innovation is not None:
            past_y = None if state is None or state.eidetic is None else state.eidetic.y
            if self._needs_innovation(sequence):
                innovation_bt, predictor_loss = self.innovation(y_btd, past_y, readable.doc_ids_bt)
            evidence = self._evidence(readable, innovation_bt, from_ssm.delta_error_bt, window.v)
            candidates = self._candidates(config, evidence, plain_k, window.v, sequence)

        num_slots = 0
        if state is not None and start:  # at the beginning there is nothing to join
            past = state.window.before(start)
            window, fading = window.behind(past), fading.behind(state.fading.before(start))
            if candidates is not None and state.eidetic is not None:
                candidates = candidates.behind(state.eidetic.before(start, past.v))
                num_slots = self.num_slots
        eidetic = kept_bjm = None
        if candidates is None:
            q_near = sequence.rotary.rotate(q_bthp)
        else:
            kept_bjm = self._select(config, candidates, sequence, num_slots)
            q_near, q_far = sequence.rotary.near_and_far(q_bthp, config.window_size)  # slots are seen at distance W
            eidetic = Eidetic(q_far, candidates.k, candidates.v, kept_bjm)
        num_fading = max(fading.k.shape[1] + t - readable.num_tokens - config.window_size, 1)
        inputs = AttentionInputs(
            q_near,
            *window,
            FadingRows(*fading.first(num_fading)),
            eidetic,
            window_size=config.window_size,
            chunk_size=config.chunk_size,
            doc_ids_bt=sequence.doc_ids_bt,
            num_past=start,
        )
        out_btd = self._output(memory_attention(*inputs), all_y_btd)

        memory = None
        if sequence.return_memory:
            kept_position_bjm = None if candidates is None or kept_bjm is None else candidates.positions(kept_bjm)
            memory = LayerMemory(innovation_bt, kept_position_bjm, attention_mass(inputs))
        if state is not None:
            state.window.refill(window, start + t)
            state.fading.refill(fading, start + t)
            if candidates is not None and state.eidetic is not None and kept_bjm is not None:
                state.eidetic.refill(candidates, y_btd, kept_bjm[:, -1], start + t)
        return MixerOutput(out_btd, predictor_loss, memory)

    def make_tables(self, rotary: RotaryTable) -> None:
        """Also those of the distance at which slots are seen."""
        super().make_tables(rotary)
        if self.innovation is not None:
            rotary.at(self.config.window_size).make()

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable, state: BMojoState) -> Tensor:
        projections = self.projections
        into_ssm, queries, keys_values = project_each(u_bd, self.ssm.in_proj, projections.q_proj, projections.kv_proj)
        y_bd, error_b = self.ssm.step_of_projected(into_ssm, state.ssm, self._reads_errors)
        queries, keys_values = projections.with_neighbours(queries, keys_values, state.window.conv)
        k_bhp, v_bhp = projections.as_keys_values(keys_values)
        fading = projections.as_keys_values((self.fading_kv_proj or projections.kv_proj)(y_bd))
        window_size, eidetic = self.config.window_size, state.eidetic
        rotated_q = memory_write(
            projections.as_queries(queries),
            k_bhp,
            v_bhp,
            position_b,
            rotary.cos_sin,
            far=None if eidetic is None else rotary.at(window_size).cos_sin,
            rings=state.rings(),
            fading=fading,
        )
        slots = None
        if self.innovation is not None and eidetic is not None:
            evidence = Evidence(position_b, None, self._step_innovation(y_bd, eidetic.y), error_b, v_bhp)
            given_b = None if self.rule is Innovation else self.rule.log_score(evidence, self.config)
            eidetic.hold(
                y_bd, position_b, self.innovation.weights_of_a_step(y_bd.device), given_b, state.window.v,
                self.config.chunk_size, self.rule.tau(self.config),
            )  # fmt: skip
            slots = Slots(rotated_q[1], eidetic.slots.k, eidetic.slots.v, eidetic.slots.position)
        inputs = StepInputs(
            rotated_q[0],
            state.window.k,
            state.window.v,
            position_b,
            FadingRows(state.fading.k, state.fading.v),
            slots,
            window_size=window_size,
        )
        out_bhp = memory_attention_step(*inputs) if self.long_term is None else self.long_term.attend(inputs)
        return self._output(out_bhp, y_bd)

    @torch.no_grad()
    def kept_under(self, configs: Iterable[ModelFields], u_btd: Tensor, sequence: Sequence) -> list[Tensor]:
        """What the layer, as it is, would keep of a whole sequence by the rules of other configs, which differ from its
        own in nothing else: positions [b, j, m] as in LayerMemory. The layer must have slots."""
        assert self.innovation is not None
        from_ssm = self.ssm(u_btd, replace(sequence, delta_error=True))
        innovation_bt, _ = self.innovation(from_ssm.out_btd, None, sequence.doc_ids_bt)
        window, plain_k = self.projections.keys_values(u_btd, sequence, None)
        evidence = self._evidence(sequence, innovation_bt, from_ssm.delta_error_bt, window.v)
        kept = []
        for config in configs:
            candidates = self._candidates(config, evidence, plain_k, window.v, sequence)
            kept.append(candidates.positions(self._select(config, candidates, sequence, 0)))
        return kept

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> BMojoState:
        config = self.config
        chunk = config.chunk_size if self.num_slots else 0
        window, fading = (
            RingCache.empty(self.projections, batch_size, size, device, dtype)
            for size in (config.window_size + chunk, 2 * config.window_size)
        )
        window.conv = self.projections.init_tails(batch_size, device, dtype)
        ssm = self.ssm.init_state(batch_size, device, dtype)
        eidetic = None
        if self.num_slots:
            eidetic = EideticState.empty(window, self.num_slots, self.rule.outputs_kept(config), config.d_model)
        return BMojoState(ssm, window, fading, eidetic)

    def _num_readable(self, sequence: Sequence, state: BMojoState | None) -> int:
        """How many tokens need a y: all, if the state or an inspection has a use for them."""
        if state is not None or sequence.return_memory:
            return sequence.num_tokens
        return self.readable_positions(self.config, sequence.num_tokens)

    @property
    def _reads_errors(self) -> bool:
        return self.num_slots > 0 and self.rule.READS == "delta_error"

    def _needs_innovation(self, sequence: Sequence) -> bool:
        """For the rule, an inspection, or the loss of a predictor."""
        assert self.innovation is not None
        learns = self.innovation.predictor is not None and torch.is_grad_enabled()
        return self.rule.READS == "innovation" or sequence.return_memory or learns

    def _step_innovation(self, y_bd: Tensor, past_bkd: Tensor | None) -> Tensor | None:
        """e of a token per row, if the rule reads it and the decoding step's operator does not compute it itself."""
        if self.innovation is None or self.rule.READS != "innovation" or self.rule is Innovation:
            return None
        innovation_b1: Tensor = self.innovation(y_bd[:, None], past_bkd)[0]
        return innovation_b1[:, 0]

    @staticmethod
    def _evidence(
        readable: Sequence, innovation_bt: Tensor | None, delta_error_bt: Tensor | None, values: Tensor
    ) -> Evidence:
        """Of the first tokens, whose y is known."""
        t = readable.num_tokens
        position_t = torch.arange(readable.start, readable.start + t, device=values.device)
        position_bt = position_t.expand(values.shape[0], -1)
        error_bt = None if delta_error_bt is None else first(delta_error_bt, t)
        return Evidence(position_bt, readable.doc_ids_bt, innovation_bt, error_bt, first(values, t), readable.wanted_bt)

    @staticmethod
    def _candidates(config: ModelFields, evidence: Evidence, k: Tensor, v: Tensor, sequence: Sequence) -> Candidates:
        """The tokens at hand, scored by the config's rule; the evidence is that of the first of them."""
        t, rule = sequence.num_tokens, RULES[config.selection]
        with torch.no_grad():
            log_e_bt = rule.log_score(evidence, config).to(torch.promote_types(v.dtype, torch.float32))
        log_e_bt = F.pad(log_e_bt, (0, t - log_e_bt.shape[1]))  # these do not leave the window of any query here
        position_bt = torch.arange(sequence.start, sequence.start + t, device=k.device).expand(k.shape[0], -1)
        return Candidates(k, v, log_e_bt, position_bt)

    def _select(self, config: ModelFields, candidates: Candidates, sequence: Sequence, num_slots: int) -> Tensor:
        """Rows of the candidates that each chunk's queries read, best first [b, j, m]; -1: none."""
        return innovation_select(
            candidates.log_e, candidates.position, num_queries=sequence.num_tokens, chunk_size=config.chunk_size,
            start=sequence.start, window_size=config.window_size, num_eidetic=self.num_slots,
            tau=RULES[config.selection].tau(config), doc_ids_bs=sequence.doc_ids_bt, num_slots=num_slots,
        )  # fmt: skip

    def _output(self, attention_hp: Tensor, y_d: Tensor) -> Tensor:
        """out_proj(attention), and gain * y if y is added; leading dimensions alike."""
        out_d = self.out_proj(attention_hp.flatten(-2))
        return out_d if self.fading_gain is None else torch.addcmul(out_d, y_d, self.fading_gain.to(y_d.dtype))


class BMojoF(BMojo):
    """B'MOJO without an eidetic memory."""

    IS_EIDETIC = False


def mean_eidetic(num_slots: int, config: ModelFields, seq_len: int) -> float:
    """Filled eidetic slots, averaged over positions; of a rule that leaves some empty, those there are."""
    total = 0
    for start in range(0, seq_len, config.chunk_size):
        filled = min(num_slots, max(0, start - config.window_size + 1))
        total += filled * (min(start + config.chunk_size, seq_len) - start)
    return total / seq_len

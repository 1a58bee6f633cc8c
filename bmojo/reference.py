"""The model family as a literal loop over tokens: the definition that every faster path is compared with.

Written for readers and tests: one sequence, one token at a time, float64, weights read by name, and nothing shared with
the modules in bmojo/mixers or the operators in kernels. Letters: t time, d model width, h heads, p channels per head,
n SSM state, W window_size, C chunk_size, M num_eidetic. Sources: arXiv:2407.06324 (B'MOJO), 2405.21060 (Mamba-2),
2312.00752 (Mamba), 2603.15569 (Mamba-3), 2412.06464 (Gated DeltaNet), 2510.26692 (Kimi Delta Attention), 2104.09864
(RoPE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from bmojo.config import ModelConfig
from bmojo.mixers.selection import random_rank
from bmojo.model import BMojoLM

Weights = dict[str, Tensor]


@dataclass
class Reference:
    """What the loop gives for one sequence.

    Attributes:
        logits_tv: float64.
        score_lt: of every bmojo layer, in order, the score by which each token is kept, -inf if it never is; for the
            rules of innovation and error its logarithm.
        eidetic_lt: for every bmojo layer the positions each token sees through the eidetic memory, best first.
        wanted: as given.
    """

    logits_tv: Tensor
    score_lt: list[list[float]] = field(default_factory=list)
    eidetic_lt: list[list[list[int]]] = field(default_factory=list)
    wanted: list[bool] | None = None


def reference_forward(
    model: BMojoLM, tokens_t: Tensor, doc_ids_t: Tensor | None = None, wanted_t: Tensor | None = None
) -> Reference:
    """Run one sequence of tokens through the model.

    Args: doc_ids_t: integers, equal within a document, non-decreasing. None: the sequence is one document.
        wanted_t: bool, the positions that selection=oracle keeps.
    """
    config, weights = model.config, {name: w.detach().double() for name, w in model.state_dict().items()}
    docs = [0] * len(tokens_t) if doc_ids_t is None else doc_ids_t.tolist()
    x_td = weights["embedding.weight"][tokens_t]
    trace = Reference(x_td, wanted=None if wanted_t is None else wanted_t.tolist())
    for layer, mixer in enumerate(config.mixers):
        config = model.config.of_layer(layer)
        w = _part(weights, f"blocks.{layer}.")
        u_td = _rms_norm(x_td, w["mixer_norm.weight"], config)
        x_td = x_td + _mix(mixer, config, _part(w, "mixer."), u_td, docs, trace)
        if config.ff_width:
            gate, up = (_rms_norm(x_td, w["mlp_norm.weight"], config) @ w["mlp.gate_up_proj.weight"].T).chunk(2, -1)
            x_td = x_td + (silu(gate) * up) @ w["mlp.down_proj.weight"].T
    trace.logits_tv = _rms_norm(x_td, weights["norm.weight"], config) @ weights["head.weight"].T
    return trace


def _mix(mixer: str, config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int], trace: Reference) -> Tensor:
    if mixer == "mamba":
        return _mamba(config, w, u_td, docs)
    if mixer == "mamba2":
        return _mamba2(config, w, u_td, docs, config.ssm_expand)
    if mixer == "mamba3":
        return _mamba3(config, w, u_td, docs)
    if mixer == "gated_deltanet":
        return _gated_deltanet(config, w, u_td, docs, config.ssm_expand)
    if mixer == "kda":
        return _kda(config, w, u_td, docs)
    return _attention(mixer, config, w, u_td, docs, trace)


def _attention(mixer: str, config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int], trace: Reference) -> Tensor:
    """One softmax over window, fading and eidetic memory; `swa` has only the first, `attention` an endless window."""
    W, num_tokens = config.window_size, len(u_td)
    heads, p = config.num_heads, config.attention_head_dim
    q_thp = _queries(config, w, u_td, docs)
    k_thp, v_thp = _keys_values(config, w, _with_neighbours("kv", config, w, u_td, docs))
    has_fading = mixer in ("bmojo", "bmojo_f")
    if has_fading:
        errors: list[float] = []
        ssm = _gated_deltanet if config.fading_ssm == "gated_deltanet" else _mamba2
        y_td = ssm(config, _part(w, "ssm."), u_td, docs, config.fading_expand, errors)
        fading_kv = w.get("fading_kv_proj.weight", w["projections.kv_proj.weight"])
        fk_thp, fv_thp = _keys_values(config, w, y_td @ fading_kv.T)  # y_t has seen its neighbours
    if mixer == "bmojo":
        if config.selection in ("innovation", "threshold"):
            scores = _innovation(config, w, y_td, docs)
        elif config.selection == "delta_error":
            scores = [math.log(max(error, 1e-30)) for error in errors]
        else:
            scores = _simple_scores(config, v_thp[:, :: heads // config.kv_heads], docs, trace.wanted)
        trace.score_lt.append(scores)
        trace.eidetic_lt.append([_eidetic_set(config, scores, docs, t) for t in range(num_tokens)])

    out = []
    for t in range(num_tokens):
        here = [i for i in range(t + 1) if docs[i] == docs[t]]
        window = [i for i in here if mixer == "attention" or t - W < i <= t]
        fading = [i for i in here if has_fading and t - 2 * W < i <= t - W]
        eidetic = trace.eidetic_lt[-1][t] if mixer == "bmojo" else []
        near = _rope(q_thp[t], t, config)
        far = _rope(q_thp[t], W, config)  # kept tokens are seen at the constant distance W
        logits = [(near * _rope(k_thp[i], i, config)).sum(-1) for i in window]
        logits += [(near * _rope(fk_thp[i], i, config)).sum(-1) for i in fading]
        logits += [(far * k_thp[i]).sum(-1) for i in eidetic]
        values = [v_thp[i] for i in window] + [fv_thp[i] for i in fading] + [v_thp[i] for i in eidetic]
        weight_sh = torch.softmax(torch.stack(logits) * p**-0.5, 0)
        out.append((weight_sh[..., None] * torch.stack(values)).sum(0).reshape(heads * p))
    out_td = torch.stack(out) @ w["out_proj.weight"].T
    return out_td + w["fading_gain"] * y_td if has_fading and config.adds_fading_output else out_td


def _eidetic_set(config: ModelConfig, scores: list[float], docs: list[int], t: int) -> list[int]:
    """S_{floor(t / C)}: the M best-ranked i <= jC - W of the document that holds jC; none for queries of another."""
    assert isinstance(config.num_eidetic, int)
    boundary = t // config.chunk_size * config.chunk_size
    if docs[boundary] != docs[t]:
        return []
    candidates = [i for i in range(boundary - config.window_size + 1) if docs[i] == docs[boundary]]
    candidates = [i for i in candidates if scores[i] > -math.inf]
    if config.selection in ("recency", "threshold"):
        return candidates[::-1][: config.num_eidetic]
    tau = config.innovation_tau
    rank = {i: scores[i] if tau is None else tau * scores[i] + i for i in candidates}
    return sorted(candidates, key=lambda i: (-rank[i], i))[: config.num_eidetic]


def _innovation(config: ModelConfig, w: Weights, y_td: Tensor, docs: list[int]) -> list[float]:
    """log e_i,  e_i = |y_i - yhat_i|^2 / (|y_i|^2 + 1e-6),  yhat_i = sum_{j=1..K} w_j * y_{i-j} in the document."""
    taps = range(1, config.innovation_taps + 1)
    total = sum(config.innovation_decay**j for j in taps)
    fixed = [torch.tensor(config.innovation_decay**j / total) for j in taps]
    weights = list(w.get("innovation.predictor", fixed))
    scores = []
    for i, y_d in enumerate(y_td):
        past = [(j, i - j) for j in taps if i - j >= 0 and docs[i - j] == docs[i]]
        predicted_d = sum((weights[j - 1] * y_td[before] for j, before in past), torch.zeros_like(y_d))
        e = (y_d - predicted_d).square().sum() / (y_d.square().sum() + 1e-6)
        scores.append(float(e.clamp_min(1e-30).log()))
    if config.selection == "threshold":
        assert config.selection_threshold is not None
        return [score if math.exp(score) > config.selection_threshold else -math.inf for score in scores]
    return scores


def _simple_scores(config: ModelConfig, v_thp: Tensor, docs: list[int], wanted: list[bool] | None) -> list[float]:
    """Of the rules that look at a token alone. v_thp: each head's values once."""
    if config.selection == "random":
        return [float(random_rank(torch.tensor(i - docs.index(docs[i])))) for i in range(len(docs))]
    if config.selection == "value_norm":
        return [float(v_hp.square().sum().sqrt().clamp_min(1e-30).log()) for v_hp in v_thp]
    if config.selection == "oracle":
        assert wanted is not None
        return [0.0 if is_wanted else -math.inf for is_wanted in wanted]
    return [0.0] * len(docs)


def _mamba2(
    config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int], expand: int, errors: list[float] | None = None
) -> Tensor:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t;  out = W RMSNorm(y * SiLU(z)).

    Args: errors: gets the sum over heads of dt_t |x_t - exp(dt_t A) S_{t-1} B_t|.
    """
    width, p, n, groups = expand * config.d_model, config.ssm_head_dim, config.d_state, config.ssm_num_groups
    heads = width // p
    z_ti, conv_tc, dt_th = (u_td @ w["in_proj.weight"].T).split([width, width + 2 * groups * n, heads], -1)
    x_ti, B_tm, C_tm = _conv(conv_tc, w["conv_weight"], docs).split([width, groups * n, groups * n], -1)
    A_h, state_hpn, out = -w["A_log"].exp(), torch.zeros(heads, p, n, dtype=u_td.dtype), []
    for t in range(len(u_td)):
        if t and docs[t] != docs[t - 1]:
            state_hpn = torch.zeros_like(state_hpn)
        x_hp = x_ti[t].view(heads, p)
        B_hn, C_hn = (m[t].view(groups, n).repeat_interleave(heads // groups, 0) for m in (B_tm, C_tm))
        dt_h = softplus(dt_th[t] + w["dt_bias"])
        write_hpn = dt_h[:, None, None] * x_hp[:, :, None] * B_hn[:, None, :]
        state_hpn = (dt_h * A_h).exp()[:, None, None] * state_hpn
        if errors is not None:
            errors.append(float((dt_h * (x_hp - (state_hpn * B_hn[:, None, :]).sum(-1)).norm(dim=-1)).sum()))
        state_hpn = state_hpn + write_hpn
        y_hp = (state_hpn * C_hn[:, None, :]).sum(-1) + w["D"][:, None] * x_hp
        out.append(_rms_norm(y_hp.reshape(width) * silu(z_ti[t]), w["norm.weight"], config))
    return torch.stack(out) @ w["out_proj.weight"].T


def _mamba(config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int]) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = h_t C_t + D x_t, per channel;  out = W (y * SiLU(z))."""
    n, rank = config.mamba_d_state, config.dt_rank
    x_ti, z_ti = (u_td @ w["in_proj.weight"].T).chunk(2, -1)
    x_ti = _conv(x_ti, w["conv_weight"], docs)
    A_in, state_in, out = -w["A_log"].exp(), torch.zeros_like(w["A_log"]), []
    for t, x_i in enumerate(x_ti):
        if t and docs[t] != docs[t - 1]:
            state_in = torch.zeros_like(state_in)
        low_r, B_n, C_n = (x_i @ w["x_proj.weight"].T).split([rank, n, n])
        dt_i = softplus(low_r @ w["dt_proj.weight"].T + w["dt_bias"])
        state_in = (dt_i[:, None] * A_in).exp() * state_in + (dt_i * x_i)[:, None] * B_n
        out.append((state_in @ C_n + w["D"] * x_i) * silu(z_ti[t]))
    return torch.stack(out) @ w["out_proj.weight"].T


def _mamba3(config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int]) -> Tensor:
    """h_t = a_t (h_{t-1} + (1 - l_t) dt_t x_{t-1} B_{t-1}^T) + l_t dt_t x_t B_t^T;  y_t = h_t C_t + D x_t;
    out = W (y * SiLU(z)).  B_t and C_t are normed, have a bias, and are turned by the sum of dt pi tanh(angle)."""
    width, p, n, groups = config.ssm_expand * config.d_model, config.ssm_head_dim, config.d_state, config.ssm_num_groups
    heads, num_angles = width // p, n // 4
    widths = [width, width, groups * n, groups * n, heads, heads, heads, num_angles]
    z_ti, x_ti, B_tm, C_tm, dt_th, rate_th, share_th, angle_ta = (u_td @ w["in_proj.weight"].T).split(widths, -1)
    state_hpn, angle_ha = u_td.new_zeros(heads, p, n), u_td.new_zeros(heads, num_angles)
    past_hpn, out = torch.zeros_like(state_hpn), []
    for t in range(len(u_td)):
        if t and docs[t] != docs[t - 1]:
            state_hpn, past_hpn, angle_ha = (torch.zeros_like(m) for m in (state_hpn, past_hpn, angle_ha))
        dt_h, share_h = softplus(dt_th[t] + w["dt_bias"]), torch.sigmoid(share_th[t])
        decay_h = (dt_h * (-softplus(rate_th[t])).clamp_max(-1e-4)).exp()
        angle_ha = angle_ha + torch.pi * angle_ta[t].tanh() * dt_h[:, None]
        maps = []
        for name, of_t in (("B", B_tm[t]), ("C", C_tm[t])):
            by_group = _rms_norm(of_t.view(groups, n), w[f"{name}_norm.weight"], config)
            m_hn = by_group.repeat_interleave(heads // groups, 0) + w[f"{name}_bias"]
            pairs = torch.view_as_complex(m_hn[:, : 2 * num_angles].reshape(heads, num_angles, 2).contiguous())
            turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_ha), angle_ha)).flatten(1)
            maps.append(torch.cat([turned, m_hn[:, 2 * num_angles :]], 1))
        B_hn, C_hn = maps
        x_hp = x_ti[t].view(heads, p)
        now_hpn = x_hp[:, :, None] * B_hn[:, None, :]
        before_h, now_h = (1 - share_h) * dt_h, share_h * dt_h
        state_hpn = decay_h[:, None, None] * (state_hpn + before_h[:, None, None] * past_hpn)
        state_hpn = state_hpn + now_h[:, None, None] * now_hpn
        past_hpn = now_hpn
        y_hp = (state_hpn * C_hn[:, None, :]).sum(-1) + w["D"][:, None] * x_hp
        out.append(y_hp.reshape(width) * silu(z_ti[t]))
    return torch.stack(out) @ w["out_proj.weight"].T


def _gated_deltanet(
    config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int], expand: int, errors: list[float] | None = None
) -> Tensor:
    """a_t is one number per head;  out = W (RMSNorm(y) * SiLU(z)).  errors: as in _delta_rule."""
    width, n = expand * config.d_model, config.d_state
    heads = width // config.ssm_head_dim
    z_ti, conv_tc, a_th, b_th = (u_td @ w["in_proj.weight"].T).split([width, 2 * heads * n + width, heads, heads], -1)
    a_th = (-w["A_log"].exp() * softplus(a_th + w["dt_bias"])).exp()
    y_thp = _delta_rule(config, w, conv_tc, a_th[..., None].expand(-1, -1, n), torch.sigmoid(b_th), docs, errors)
    return (y_thp.flatten(1) * silu(z_ti)) @ w["out_proj.weight"].T


def _kda(config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int]) -> Tensor:
    """a_t is one number per head and channel of the keys;  out = W (RMSNorm(y) * sigmoid(z))."""
    width, n, rank = config.ssm_expand * config.d_model, config.d_state, config.ssm_head_dim
    heads = width // config.ssm_head_dim
    widths = [rank, 2 * heads * n + width, rank, heads]
    z_tr, conv_tc, a_tr, b_th = (u_td @ w["in_proj.weight"].T).split(widths, -1)
    step_thn = softplus(a_tr @ w["decay_proj.weight"].T + w["dt_bias"]).unflatten(-1, (heads, n))
    a_thn = (-w["A_log"].exp()[:, None] * step_thn).exp()
    y_thp = _delta_rule(config, w, conv_tc, a_thn, torch.sigmoid(b_th), docs)
    return (y_thp.flatten(1) * torch.sigmoid(z_tr @ w["gate_proj.weight"].T)) @ w["out_proj.weight"].T


def _delta_rule(
    config: ModelConfig,
    w: Weights,
    conv_tc: Tensor,
    a_thn: Tensor,
    b_th: Tensor,
    docs: list[int],
    errors: list[float] | None = None,
) -> Tensor:
    """RMSNorm(y):  S_t = S_{t-1} Diag(a_t) (I - b_t k_t k_t^T) + b_t v_t k_t^T;  y_t = S_t q_t.

    Args: errors: gets the sum over heads of b_t |v_t - S_{t-1} Diag(a_t) k_t|.
    """
    (_, heads, n), p = a_thn.shape, config.ssm_head_dim
    q_tm, k_tm, v_ti = _conv(conv_tc, w["conv_weight"], docs).split([heads * n, heads * n, heads * p], -1)
    state_hpn, identity_nn, out = conv_tc.new_zeros(heads, p, n), torch.eye(n, dtype=conv_tc.dtype), []
    for t in range(len(conv_tc)):
        if t and docs[t] != docs[t - 1]:
            state_hpn = torch.zeros_like(state_hpn)
        y_hp, error = conv_tc.new_zeros(heads, p), 0.0
        for h in range(heads):
            q_n, k_n = (x[h * n : (h + 1) * n] for x in (q_tm[t], k_tm[t]))
            q_n, k_n = (x / (x.square().sum() + 1e-6).sqrt() for x in (q_n, k_n))
            v_p = v_ti[t, h * p : (h + 1) * p]
            error += float(b_th[t, h] * (v_p - state_hpn[h] * a_thn[t, h] @ k_n).norm())
            erased_pn = state_hpn[h] * a_thn[t, h] @ (identity_nn - b_th[t, h] * torch.outer(k_n, k_n))
            state_hpn[h] = erased_pn + b_th[t, h] * torch.outer(v_p, k_n)
            y_hp[h] = state_hpn[h] @ q_n
        if errors is not None:
            errors.append(error)
        out.append(_rms_norm(y_hp, w["norm.weight"], config))
    return torch.stack(out)


def _conv(x_tc: Tensor, weight_ck: Tensor, docs: list[int]) -> Tensor:
    """SiLU of a causal convolution per channel; the last tap is the token itself."""
    taps, out = weight_ck.shape[1], []
    for t in range(len(x_tc)):
        lags = [j for j in range(taps) if t - j >= 0 and docs[t - j] == docs[t]]
        out.append(silu(sum((weight_ck[:, taps - 1 - j] * x_tc[t - j] for j in lags), torch.zeros_like(x_tc[t]))))
    return torch.stack(out)


def _with_neighbours(which: str, config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int]) -> Tensor:
    """Projections of u for `q` or `kv`, and the short convolution of them, if there is one."""
    x_tc = u_td @ w[f"projections.{which}_proj.weight"].T
    return x_tc + _conv(x_tc, w[f"projections.{which}_conv.weight"], docs) if config.attention_conv_width else x_tc


def _queries(config: ModelConfig, w: Weights, u_td: Tensor, docs: list[int]) -> Tensor:
    q_tc = _with_neighbours("q", config, w, u_td, docs)
    q_thp = q_tc.unflatten(-1, (config.num_heads, config.attention_head_dim))
    return _rms_norm(q_thp, w["projections.q_norm.weight"], config) if config.qk_norm else q_thp


def _keys_values(config: ModelConfig, w: Weights, projected_tc: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (not rotated) and values, repeated for the query heads that share them."""
    k_thp, v_thp = projected_tc.unflatten(-1, (2 * config.kv_heads, config.attention_head_dim)).chunk(2, -2)
    if config.qk_norm:
        k_thp = _rms_norm(k_thp, w["projections.k_norm.weight"], config)
    sharing = config.num_heads // config.kv_heads
    return k_thp.repeat_interleave(sharing, -2), v_thp.repeat_interleave(sharing, -2)


def _rope(x_hp: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Rotate each pair of channels (i, i + p/2) by position * theta^(-2i/p)."""
    p = x_hp.shape[-1]
    angle = position * config.rope_theta ** (-2 * torch.arange(p // 2, dtype=x_hp.dtype) / p)
    first, second = x_hp.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


def _rms_norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight


def _part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

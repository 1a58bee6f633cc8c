"""The identities that define the family (docs/model.md), over random shapes in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo import BMojoLM, ModelConfig
from kernels.operator import use
from tests.bmojo.model_family import PATTERNS, build, configs, random_tokens, small_config

TOLERANCE = 1e-10
few = settings(max_examples=25, deadline=None)


def like(config: ModelConfig, source: BMojoLM) -> BMojoLM:
    """A model of another config with the source's weights, where it has such weights."""
    model = BMojoLM(config).double()
    missing, _ = model.load_state_dict(source.state_dict(), strict=False)
    assert not missing
    return model


@few
@given(config=configs(("bmojo*2",)), t=st.integers(1, 40), seed=st.integers(0, 99))
def test_bmojo_without_slots_is_bmojo_f(config, t, seed):
    model = build(config, seed)
    tokens = random_tokens(2, t, seed)
    without_slots = like(config.replace(num_eidetic=0), model)
    bmojo_f = like(config.replace(pattern="bmojo_f*2"), model)
    torch.testing.assert_close(without_slots(tokens).logits_btv, bmojo_f(tokens).logits_btv, rtol=0, atol=0)


@few
@given(config=configs(("bmojo*2", "bmojo_f*2")), t=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_gain_of_zero_adds_nothing(config, t, seed):
    """memory_and_residual with gain 0 is memory: also y of the tokens that no query reads leaves no trace."""
    model = build(config.replace(fading_output="memory_and_residual"), seed)
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.fading_gain)
    weights = {name: w for name, w in model.state_dict().items() if not name.endswith("fading_gain")}
    plain = BMojoLM(config.replace(fading_output="memory")).double()
    plain.load_state_dict(weights)
    tokens = random_tokens(2, t, seed)
    torch.testing.assert_close(model(tokens).logits_btv, plain(tokens).logits_btv, rtol=0, atol=TOLERANCE)


@few
@given(config=configs(("bmojo", "bmojo_f")), t=st.integers(1, 40), seed=st.integers(0, 99))
def test_without_attention_the_layer_is_its_ssm_times_the_gain(config, t, seed):
    config = config.replace(fading_output="memory_and_residual", d_ff=0)
    model = build(config, seed)
    mixer = model.blocks[0].mixer
    torch.nn.init.zeros_(mixer.out_proj.weight)
    ssm = BMojoLM(config.replace(pattern=config.fading_ssm, ssm_expand=config.fading_expand)).double()
    weights = {name.replace(".ssm.", "."): w for name, w in model.state_dict().items()}
    weights["blocks.0.mixer.out_proj.weight"] = mixer.fading_gain[:, None] * mixer.ssm.out_proj.weight
    ssm.load_state_dict({name: w for name, w in weights.items() if name in ssm.state_dict()})
    tokens = random_tokens(2, t, seed)
    torch.testing.assert_close(model(tokens).logits_btv, ssm(tokens).logits_btv, rtol=0, atol=TOLERANCE)


@few
@given(config=configs(("bmojo_f*2",)), t=st.integers(1, 40), seed=st.integers(0, 99))
def test_bmojo_f_whose_window_covers_everything_before_fading_is_swa(config, t, seed):
    """No position is older than the window, so nothing of the fading memory is in reach."""
    config = config.replace(window_size=t, chunk_size=1, fading_output="memory")
    model = build(config, seed)
    swa = BMojoLM(config.replace(pattern="swa*2")).double()
    swa.load_state_dict({k.replace(".ssm.", ".none."): v for k, v in model.state_dict().items()}, strict=False)
    tokens = random_tokens(2, t, seed)
    torch.testing.assert_close(model(tokens).logits_btv, swa(tokens).logits_btv, rtol=0, atol=TOLERANCE)


@few
@given(config=configs(("bmojo_f*2",)), t=st.integers(1, 40), seed=st.integers(0, 99))
def test_bmojo_f_with_fading_masked_is_swa(config, t, seed):
    config = config.replace(fading_output="memory")
    model = build(config, seed)
    swa = like(config.replace(pattern="swa*2"), model)
    tokens = random_tokens(2, t, seed)
    import bmojo.mixers.bmojo as mixer

    attention = mixer.memory_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixer, "memory_attention", lambda q, k, v, fading, *rest: attention(q, k, v, None, *rest))
        masked = model(tokens).logits_btv
    torch.testing.assert_close(masked, swa(tokens).logits_btv, rtol=0, atol=TOLERANCE)


@few
@given(config=configs(("swa*2",)), t=st.integers(1, 40), beyond=st.integers(0, 5), seed=st.integers(0, 99))
def test_swa_whose_window_holds_all_tokens_is_attention(config, t, beyond, seed):
    config = config.replace(window_size=t + beyond, chunk_size=1)
    model = build(config, seed)
    attention = like(config.replace(pattern="attention*2"), model)
    tokens = random_tokens(2, t, seed)
    torch.testing.assert_close(model(tokens).logits_btv, attention(tokens).logits_btv, rtol=0, atol=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(config=configs(), t=st.integers(2, 45), data=st.data(), seed=st.integers(0, 99))
def test_forward_is_prefill_of_any_prefix_and_decoding_of_the_rest(config, t, data, seed):
    model = build(config, seed)
    tokens = random_tokens(2, t, seed)
    with torch.no_grad():
        whole = model(tokens).logits_btv
    first = data.draw(st.integers(1, t - 1))
    second = data.draw(st.integers(first, t - 1))
    logits, state = model.prefill(tokens[:, :first])
    torch.testing.assert_close(logits, whole[:, first - 1], rtol=0, atol=TOLERANCE)
    if second > first:
        logits, state = model.prefill(tokens[:, first:second], state)
        torch.testing.assert_close(logits, whole[:, second - 1], rtol=0, atol=TOLERANCE)
    for position in range(second, t):
        logits, state = model.step(tokens[:, position], state)
        torch.testing.assert_close(logits, whole[:, position], rtol=0, atol=TOLERANCE)


@few
@given(config=configs(), t=st.integers(1, 30), seed=st.integers(0, 99), documents=st.booleans())
def test_fast_kernels_agree_with_the_references_in_logits_and_gradients(config, t, seed, documents):
    model = build(config, seed)
    tokens = random_tokens(2, t, seed)
    docs = (torch.arange(t) // 7).expand(2, -1) if documents else None
    results = []
    for path in ("reference", "torch"):
        with use(path):
            model.zero_grad()
            loss = model(tokens, tokens.roll(-1, 1), doc_ids_bt=docs).loss
            loss.backward()
            results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, grads), (fast_loss, fast_grads) = results
    torch.testing.assert_close(fast_loss, loss, rtol=0, atol=TOLERANCE)
    for grad, fast_grad in zip(grads, fast_grads, strict=True):
        torch.testing.assert_close(fast_grad, grad, rtol=0, atol=TOLERANCE)


@few
@given(config=configs(("bmojo_f*2", "bmojo*2")), t=st.integers(1, 40), seed=st.integers(0, 99), documents=st.booleans())
def test_the_ssm_runs_only_over_what_queries_read_of_it_and_nothing_else_changes(config, t, seed, documents):
    """An inspection has it run over all tokens: the same logits and gradients."""
    model = build(config, seed)
    tokens = random_tokens(2, t, seed)
    docs = (torch.arange(t) // 7).expand(2, -1) if documents else None
    lengths: list[int] = []
    for block in model.blocks:
        block.mixer.ssm.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    results = []
    for everywhere in (False, True):
        model.zero_grad()
        result = model(tokens, tokens.roll(-1, 1), doc_ids_bt=docs, return_memory=everywhere)
        result.loss.backward()
        results.append([result.loss.detach(), *(p.grad for p in model.parameters())])
    needs_all = config.adds_fading_output or (config.pattern == "bmojo*2" and config.innovation_predictor == "learned")
    assert lengths == [t if needs_all else max(t - config.window_size, 1)] * 2 + [t] * 2
    for some, every in zip(*results, strict=True):
        torch.testing.assert_close(some, every, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_float32_agrees_with_float64(pattern):
    tokens = random_tokens(2, 50)
    config = small_config(pattern=pattern, selection="random")  # rounding may order near-equal innovations otherwise
    precise = build(config)(tokens).logits_btv
    single = build(config, dtype=torch.float32)(tokens).logits_btv
    assert (single - precise).norm() / precise.norm() < 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_autocast_agrees_with_float64(pattern):
    """8 bits of mantissa and about ten roundings a layer: 3% of the logits' norm is what is seen, 8% the limit."""
    tokens = random_tokens(2, 50)
    config = small_config(pattern=pattern, selection="random")
    precise = build(config)(tokens).logits_btv
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = build(config, dtype=torch.float32)(tokens).logits_btv
    assert (half - precise).norm() / precise.norm() < 0.08


@few
@given(config=configs(), t=st.integers(2, 40), data=st.data(), seed=st.integers(0, 99))
def test_changing_a_token_changes_no_earlier_logit(config, t, data, seed):
    model = build(config, seed, torch.float32)
    tokens = random_tokens(2, t, seed)
    at = data.draw(st.integers(1, t - 1))
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % 23
    before, after = model(tokens).logits_btv, model(changed).logits_btv
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at], after[:, at])


def test_window_size_counts_the_current_token():
    """window_size=3: token 6 attends to tokens 4, 5 and 6."""
    model = build(small_config(pattern="swa", window_size=3, chunk_size=1))
    tokens = random_tokens(1, 8)
    seen = []
    for at in range(8):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 23
        if not torch.equal(model(changed).logits_btv[:, 6], model(tokens).logits_btv[:, 6]):
            seen.append(at)
    assert seen == [4, 5, 6]

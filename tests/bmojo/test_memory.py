"""What return_memory shows, and what the eidetic set holds."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo.checkpoint_io import load_pretrained, save_pretrained
from tests.bmojo.model_family import build, configs, random_tokens, small_config


def test_memory_is_reported_for_layers_that_have_it():
    model = build(small_config(pattern="swa,bmojo_f,bmojo"))
    tokens = random_tokens(2, 45)
    result = model(tokens, return_memory=True)
    nothing, fading, eidetic = result.memory
    assert nothing is None
    assert fading.innovation_bt is None
    assert fading.kept_position_bjm is None
    assert (fading.mass_bt3[..., 2] == 0).all()
    assert eidetic.innovation_bt.shape == (2, 45)
    assert eidetic.kept_position_bjm.shape == (2, 12, 5)
    torch.testing.assert_close(eidetic.mass_bt3.sum(-1), torch.ones(2, 45, dtype=torch.float64))
    torch.testing.assert_close(result.logits_btv, model(tokens).logits_btv, rtol=1e-12, atol=1e-12)
    assert model(tokens).memory is None


@settings(max_examples=25, deadline=None)
@given(config=configs(("bmojo",)), t=st.integers(1, 50))
def test_the_eidetic_set_is_the_top_innovations_that_left_the_window(config, t):
    config = config.replace(innovation_tau=None, selection="innovation", selection_threshold=None)
    memory = build(config)(random_tokens(1, t), return_memory=True).memory[0]
    scores = memory.innovation_bt[0].tolist()
    for chunk, kept in enumerate(memory.kept_position_bjm[0].tolist()):
        candidates = range(max(0, chunk * config.chunk_size - config.window_size + 1))
        best = sorted(candidates, key=lambda i: (-scores[i], i))[: config.num_eidetic]
        assert [position for position in kept if position >= 0] == best


def test_forgetting_gives_old_innovations_up():
    tokens = random_tokens(1, 200)
    kept = {}
    for tau in (None, 2.0):
        memory = build(small_config(pattern="bmojo", innovation_tau=tau))(tokens, return_memory=True).memory[0]
        kept[tau] = memory.kept_position_bjm[0, -1].float().mean().item()
    assert kept[2.0] > kept[None]


def test_random_selection_does_not_depend_on_the_tokens():
    model = build(small_config(pattern="bmojo", selection="random"))
    kept = [model(random_tokens(1, 90, s), return_memory=True).memory[0].kept_position_bjm for s in (0, 1)]
    assert torch.equal(*kept)


def test_more_slots_at_inference_than_at_training(tmp_path):
    save_pretrained(build(small_config(pattern="bmojo")), tmp_path)
    raised = load_pretrained(tmp_path, num_eidetic=16)
    tokens = random_tokens(1, 90)
    memory = raised(tokens, return_memory=True).memory[0]
    assert (memory.kept_position_bjm[0, -1] >= 0).all()
    logits, _ = raised.prefill(tokens)
    torch.testing.assert_close(logits, raised(tokens).logits_btv[:, -1], rtol=0, atol=1e-10)


def test_eidetic_keys_are_seen_at_one_distance_wherever_they_are():
    """Moving the whole text further away from its kept tokens' positions changes nothing: RoPE sees W for all."""
    from bmojo.layers import RotaryTable

    config = small_config(pattern="bmojo")
    q, k = (torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    at = 1000
    at_query = RotaryTable(torch.tensor([at]), 4, config.rope_theta, torch.float64)
    near_q, far_q = at_query.near_and_far(q, config.window_size)
    key = RotaryTable(torch.tensor([at - config.window_size]), 4, config.rope_theta, torch.float64).rotate(k)
    torch.testing.assert_close((far_q * k).sum(-1), (near_q * key).sum(-1))

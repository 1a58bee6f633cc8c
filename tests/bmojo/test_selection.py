"""The selection rules: each against the loop over tokens, in every form; their properties; what they refuse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmojo import BMojoLM, ModelConfig
from bmojo.counting import count
from bmojo.fields import Selection
from bmojo.mixers.selection import RULES, Evidence
from bmojo.reference import reference_forward
from tests.bmojo.model_family import build, random_tokens, small_config

DECODING = sorted(set(RULES) - {"oracle"})
NUM_IDS = 64
THRESHOLD = 1.2  # about half of the scores of random models exceed it


def of_rule(rule: str, **fields: Any) -> ModelConfig:
    threshold = THRESHOLD if rule == "threshold" else None
    return small_config(
        selection=rule, selection_threshold=threshold, **({"pattern": "bmojo", "vocab_size": NUM_IDS} | fields)
    )


def distinct_tokens(num_tokens: int, seed: int) -> Tensor:
    """No two alike: values of equal tokens have norms that rounding tells apart, each form in its own way."""
    return torch.randperm(NUM_IDS, generator=torch.Generator().manual_seed(seed))[None, :num_tokens]


def marks(num_tokens: int, seed: int) -> Tensor:
    return torch.rand(1, num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.2


def kept_sets(model: BMojoLM, tokens_bt: Tensor, wanted_bt: Tensor | None) -> list[list[int]]:
    """Of the last layer, chunk by chunk, best first."""
    with torch.no_grad():
        memory = model(tokens_bt, return_memory=True, wanted_bt=wanted_bt).memory[-1]
    return [[i for i in row if i >= 0] for row in memory.kept_position_bjm[0].tolist()]


def test_the_field_and_the_table_have_the_same_names() -> None:
    assert get_args(Selection) == tuple(RULES)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000), num_tokens=st.integers(1, 60), slots=st.sampled_from([1, 3, 40]), documents=st.booleans()
)
def test_a_whole_sequence_is_what_the_loop_gives(
    rule: str, seed: int, num_tokens: int, slots: int, documents: bool
) -> None:
    model = build(of_rule(rule, num_eidetic=slots), seed)
    tokens_bt, wanted_bt = distinct_tokens(num_tokens, seed), marks(num_tokens, seed)
    docs_bt = (torch.rand(1, num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.05).long().cumsum(1)
    expected = reference_forward(model, tokens_bt[0], docs_bt[0] if documents else None, wanted_bt[0])
    with torch.no_grad():
        found = model(tokens_bt, doc_ids_bt=docs_bt if documents else None, wanted_bt=wanted_bt).logits_btv
    torch.testing.assert_close(found[0], expected.logits_tv, rtol=1e-9, atol=1e-9)
    if not documents:
        of_chunks = expected.eidetic_lt[0][:: model.config.chunk_size]
        assert kept_sets(model, tokens_bt, wanted_bt) == of_chunks


@pytest.mark.parametrize("rule", DECODING)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), num_read=st.integers(1, 44))
def test_decoding_keeps_what_a_whole_sequence_keeps(rule: str, seed: int, num_read: int) -> None:
    """Slots hold the same positions after prefill in pieces and after steps, and the logits are the loop's."""
    model, tokens_bt = build(of_rule(rule), seed), distinct_tokens(45, seed)
    kept = kept_sets(model, tokens_bt, None)
    expected_tv = reference_forward(model, tokens_bt[0]).logits_tv
    _, state = model.prefill(tokens_bt[:, :num_read])
    for t in range(num_read, 45):
        logits_1v, state = model.step(tokens_bt[:, t], state)
        torch.testing.assert_close(logits_1v[0], expected_tv[t], rtol=1e-9, atol=1e-9)
        held = state.layers[0].eidetic.slots.position[0].tolist()
        assert [i for i in held if i >= 0] == kept[t // model.config.chunk_size]


@pytest.mark.parametrize("documents", [False, True])
def test_the_error_of_a_delta_rule_is_what_the_loop_gives(documents: bool) -> None:
    """HOLA's own score: the fading memory is Gated DeltaNet."""
    model, tokens_bt = build(of_rule("delta_error", fading_ssm="gated_deltanet", num_eidetic=3)), random_tokens(1, 50)
    docs_bt = (torch.arange(50) // 19)[None] if documents else None
    expected_tv = reference_forward(model, tokens_bt[0], None if docs_bt is None else docs_bt[0]).logits_tv
    with torch.no_grad():
        found_tv = model(tokens_bt, doc_ids_bt=docs_bt).logits_btv[0]
    torch.testing.assert_close(found_tv, expected_tv, rtol=1e-9, atol=1e-9)
    if not documents:
        _, state = model.prefill(tokens_bt[:, :21])
        for t in range(21, 50):
            logits_1v, state = model.step(tokens_bt[:, t], state)
            torch.testing.assert_close(logits_1v[0], expected_tv[t], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_more_slots_keep_a_superset(rule: str, seed: int) -> None:
    """In the first layer, whose scores do not depend on what is kept."""
    tokens_bt, wanted_bt = random_tokens(1, 80, seed), marks(80, seed)
    sets = [kept_sets(build(of_rule(rule, num_eidetic=m), seed), tokens_bt, wanted_bt) for m in (2, 5, 11)]
    for fewer, more in pairwise(sets):
        assert all(small == large[: len(small)] for small, large in zip(fewer, more, strict=True))
    assert sets[0] != sets[-1]


@pytest.mark.parametrize("rule", ["innovation", "value_norm", "delta_error"])
def test_ties_go_to_the_earlier_whatever_the_tokens_order(rule: str) -> None:
    """All scores are equal when all tokens are: then permuting nothing but the batch changes nothing, and the first
    positions stay. A scan from an empty state is in its fixed point only after a while, so a faint SSM is taken."""
    model = build(of_rule(rule, num_eidetic=4))
    evidence = Evidence(
        torch.arange(6), None, torch.full((6,), 0.5), torch.full((6,), 2.0), torch.ones(6, 2, 3), torch.ones(6).bool()
    )
    scores = RULES[rule].log_score(evidence, model.config)
    assert (scores == scores[0]).all()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = RULES[rule].log_score(Evidence(*(None if x is None else x[order] for x in evidence)), model.config)
    assert torch.equal(permuted, scores[order])


def test_recency_keeps_the_latest_and_no_position_is_too_large() -> None:
    """Positions are ranked in float64: float32 has no odd numbers above 2^24."""
    model = build(of_rule("recency", num_eidetic=3))
    kept = kept_sets(model, random_tokens(1, 80), None)
    for chunk, row in enumerate(kept):
        last = chunk * model.config.chunk_size - model.config.window_size
        assert row == [i for i in (last, last - 1, last - 2) if i >= 0]
    state = model.init_state(1)
    state.position_b += 2**26
    for _ in range(30):
        _, state = model.step(torch.zeros(1, dtype=torch.long), state)
    newest = 2**26 + 28 - model.config.window_size
    assert state.layers[0].eidetic.slots.position[0].tolist() == [newest, newest - 1, newest - 2]


def test_an_oracle_keeps_marked_tokens_and_no_others() -> None:
    model, wanted_bt = build(of_rule("oracle", num_eidetic=40)), marks(80, 1)
    kept = kept_sets(model, random_tokens(1, 80), wanted_bt)
    wanted = wanted_bt[0].nonzero()[:, 0].tolist()
    assert kept[-1] == [i for i in wanted if i <= 76 - model.config.window_size]


@pytest.mark.parametrize("call", ["forward", "prefill", "step"])
def test_an_oracle_without_marks_is_refused(call: str) -> None:
    model, tokens_bt = build(of_rule("oracle")), random_tokens(1, 20)
    calls = {
        "forward": lambda: model(tokens_bt),
        "prefill": lambda: model.prefill(tokens_bt),
        "step": lambda: model.step(tokens_bt[:, 0], model.init_state(1)),
    }
    with pytest.raises(ValueError, match="selection=oracle keeps the positions that its caller marks"):
        calls[call]()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"selection": "threshold"}, "selection=threshold needs selection_threshold"),
        ({"selection": "recency", "innovation_tau": 9.0}, "innovation_tau=9.0 has no effect with selection=recency"),
        (
            {"selection": "threshold", "selection_threshold": 1.0, "innovation_tau": 9.0},
            "innovation_tau=9.0 has no effect with selection=threshold",
        ),
        ({"selection": "innovation", "selection_threshold": 1.0}, "is read by selection=threshold alone"),
        ({"selection": "newest"}, "Input should be 'innovation'"),
        ({"pattern": "(bmojo,swa)*2", "num_eidetic": [4]}, r"num_eidetic has 1 numbers, \[4\], .* has 2 layers"),
        ({"pattern": "swa*2", "num_eidetic": [4, 4]}, "has 0 layers with an eidetic memory"),
        ({"num_eidetic": [4, -1]}, "greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        small_config(**fields)


def test_rules_are_not_checked_where_no_layer_selects() -> None:
    assert small_config(pattern="bmojo_f*2", selection="threshold").selection == "threshold"


@pytest.mark.parametrize("rule", RULES)
def test_decoding_keeps_outputs_only_for_rules_that_read_them(rule: str) -> None:
    config = of_rule(rule, pattern="bmojo*2")
    num_bytes = BMojoLM(config).init_state(1).num_bytes()
    assert count(config, 32).state_bytes == num_bytes
    outputs = 4 * 2 * config.innovation_taps * config.d_model
    innovation = BMojoLM(small_config()).init_state(1).num_bytes()
    assert innovation - num_bytes == (0 if RULES[rule].READS == "innovation" else outputs)


@pytest.mark.parametrize("rule", DECODING)
def test_layers_have_their_own_number_of_slots(rule: str) -> None:
    config = of_rule(rule, pattern="bmojo,swa,bmojo,bmojo_f,bmojo", num_eidetic=[2, 0, 7])
    model, tokens_bt = build(config), random_tokens(1, 60)
    expected = reference_forward(model, tokens_bt[0])
    with torch.no_grad():
        found = model(tokens_bt, return_memory=True)
    torch.testing.assert_close(found.logits_btv[0], expected.logits_tv, rtol=1e-9, atol=1e-9)
    held = [m.kept_position_bjm.shape[-1] for m in found.memory if m is not None and m.kept_position_bjm is not None]
    assert held == [2, 7]
    logits_1v, state = model.prefill(tokens_bt)
    torch.testing.assert_close(logits_1v, found.logits_btv[:, -1], rtol=1e-9, atol=1e-9)
    counts = count(config, 32)
    assert counts.num_params == sum(p.numel() for p in model.parameters())
    assert counts.state_bytes == BMojoLM(config).init_state(1).num_bytes()
    assert state.layers[0].eidetic.slots.k.shape[1] == 2


def test_a_list_of_equal_numbers_is_a_single_one() -> None:
    tokens_bt = random_tokens(2, 40)
    single = BMojoLM(small_config(num_eidetic=3))(tokens_bt).logits_btv
    assert torch.equal(BMojoLM(small_config(num_eidetic=[3, 3]))(tokens_bt).logits_btv, single)


def test_gradients_do_not_depend_on_how_the_error_is_read() -> None:
    """The second scan of delta_error adds nothing to the gradient: a rule that keeps the same gives the same one."""
    grads = {}
    for rule in ("delta_error", "innovation"):
        model = build(of_rule(rule, num_eidetic=100, window_size=4))  # everything is kept
        model(random_tokens(1, 40), random_tokens(1, 40, 1)).loss.backward()
        grads[rule] = [p.grad for p in model.parameters()]
    for found, expected in zip(grads["delta_error"], grads["innovation"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

"""The decoding state: constant size, ragged batches, save, load and fork; and generation on top of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bmojo.generation import generate, sample
from bmojo.prefill import piece_tokens, pieces
from bmojo.state import DecodingState
from tests.bmojo.model_family import PATTERNS, build, configs, random_tokens, small_config

few = settings(max_examples=25, deadline=None)


def shapes(state: DecodingState) -> dict[str, torch.Size]:
    return {path: x.shape for path, x in state.tensors().items()}


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern != "attention*2"])
def test_no_tensor_of_the_state_grows(pattern):
    """Positions up to 100,000 without reading that many tokens: the state is told to be there."""
    model = build(small_config(pattern=pattern), dtype=torch.float32)
    start = model.init_state(2)
    expected, num_bytes = shapes(start), start.num_bytes()
    _, state = model.prefill(random_tokens(2, 100))
    for position in (100, 4_096, 99_990):
        state.position_b.fill_(position)
        for token in random_tokens(20, 2, seed=position):
            logits, state = model.step(token, state)
            assert torch.isfinite(logits).all()
        logits, state = model.prefill(random_tokens(2, 33), state)
        assert torch.isfinite(logits).all()
        assert shapes(state) == expected
        assert state.num_bytes() == num_bytes


@few
@given(config=configs(), lengths=st.lists(st.integers(1, 20), min_size=2, max_size=3), left=st.booleans())
def test_padded_prompts_prefill_and_decode_as_if_alone(config, lengths, left):
    model = build(config)
    longest = max(lengths)
    tokens = random_tokens(len(lengths), longest)
    column = torch.arange(longest)
    valid = torch.stack([column >= longest - n if left else column < n for n in lengths])
    logits, state = model.prefill(tokens, valid_bt=valid)
    steps = random_tokens(7, len(lengths), seed=1)
    batched = [logits]
    for token in steps:
        logits, state = model.step(token, state)
        batched.append(logits)
    more, state = model.prefill(random_tokens(len(lengths), 9, seed=2), state)
    for row in range(len(lengths)):
        logits, alone = model.prefill(tokens[row : row + 1, valid[row]])
        torch.testing.assert_close(batched[0][row : row + 1], logits, rtol=0, atol=1e-10)
        for token, together in zip(steps[:, row : row + 1], batched[1:], strict=True):
            logits, alone = model.step(token, alone)
            torch.testing.assert_close(together[row : row + 1], logits, rtol=0, atol=1e-10)
        logits, alone = model.prefill(random_tokens(len(lengths), 9, seed=2)[row : row + 1], alone)
        torch.testing.assert_close(more[row : row + 1], logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_saved_and_loaded_state_goes_on_exactly(pattern, tmp_path):
    model = build(small_config(pattern=pattern))
    _, state = model.prefill(random_tokens(2, 31))
    state.save(tmp_path / "state.safetensors")
    loaded = DecodingState.load(tmp_path / "state.safetensors", model.init_state(1))
    assert loaded.num_bytes() == state.num_bytes()
    for token in random_tokens(9, 2):
        logits, state = model.step(token, state)
        loaded_logits, loaded = model.step(token, loaded)
        assert torch.equal(logits, loaded_logits)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_fork_and_its_origin_go_on_independently(pattern):
    model = build(small_config(pattern=pattern))
    _, state = model.prefill(random_tokens(1, 31))
    fork = state.clone()
    three = state.select(torch.tensor([0, 0, 0]))
    tokens = random_tokens(6, 1)
    expected = []
    for token in tokens:
        logits, state = model.step(token, state)
        expected.append(logits)
    for token, logits in zip(tokens, expected, strict=True):
        forked_logits, fork = model.step(token, fork)
        assert torch.equal(forked_logits, logits)
        of_three, three = model.step(token.expand(3), three)
        torch.testing.assert_close(of_three, logits.expand(3, -1), rtol=0, atol=1e-10)


def test_prefill_leaves_the_given_state_alone():
    model = build(small_config())
    _, state = model.prefill(random_tokens(2, 31))
    before = state.clone().tensors()
    model.prefill(random_tokens(2, 12), state)
    for path, x in state.tensors().items():
        assert torch.equal(x, before[path])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "bmojo_f*2"}, "holds layers.0.eidetic.k: another model, or another version"),
        ({"pattern": "bmojo*3"}, "lacks layers.2.eidetic.k"),
        ({"num_eidetic": 7}, r"layers.0.eidetic.slots.k is torch.float64 \[2, 5, 4, 4\], expected .* \[2, 7, 4, 4\]"),
    ],
)
def test_a_state_of_another_model_is_refused_in_words(fields, message, tmp_path):
    file = tmp_path / "state.safetensors"
    build(small_config()).prefill(random_tokens(2, 31))[1].save(file)
    with pytest.raises(ValueError, match=message):
        DecodingState.load(file, build(small_config(**fields)).init_state(1))


def test_a_damaged_or_older_state_is_refused_in_words(tmp_path):
    file, start = tmp_path / "state.safetensors", build(small_config(pattern="attention")).init_state(1)
    save_file({"position": torch.zeros(1, dtype=torch.long), "0.k": torch.zeros(1, 3, 4, 4)}, file)
    with pytest.raises(ValueError, match=r"holds 0.k: another model, or another version of this program"):
        DecodingState.load(file, start)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged, or no decoding state"):
        DecodingState.load(file, start)


def test_padding_inside_a_row_is_refused():
    model = build(small_config())
    valid = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match="row 0: padding must be on the left or on the right"):
        model.prefill(random_tokens(1, 3), valid_bt=valid)


def test_greedy_generation_takes_the_likeliest_token_of_a_full_forward():
    model = build(small_config(pattern="mamba2,bmojo,swa"))
    prompt = random_tokens(2, 9)
    made = torch.stack(list(generate(model, prompt, 15, temperature=0)), 1)
    whole = torch.cat([prompt, made], 1)
    assert torch.equal(made, model(whole).logits_btv.argmax(-1)[:, 8:-1])


def test_generation_repeats_for_a_seed_and_differs_between_seeds_and_rows():
    model = build(small_config())
    prompt = random_tokens(1, 9).expand(2, -1)

    def text(seed: int) -> list[list[int]]:
        return torch.stack(list(generate(model, prompt, 20, seed=seed)), 1).tolist()

    assert text(1) == text(1) != text(2)
    assert text(1)[0] != text(1)[1]
    alone = torch.stack(list(generate(model, prompt[:1], 20, seed=1)), 1).tolist()
    assert alone[0] == text(1)[0]


def test_rows_stop_at_stop_tokens_and_generation_ends_with_the_last():
    model = build(small_config())
    prompt = random_tokens(3, 9)
    stops = {0, 1, 2, 3, 4, 5}
    made = torch.stack(list(generate(model, prompt, 200, stop_tokens=stops)), 1)
    assert made.shape[1] < 200
    for row in made.tolist():
        first = next(i for i, token in enumerate(row) if token in stops)
        assert set(row[first:]) == {row[first]}


def test_top_k_and_top_p_cut_the_unlikely():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(400, -1)
    rngs = [torch.Generator().manual_seed(i) for i in range(400)]

    def drawn(**options: float | None) -> set[int]:
        return set(sample(logits, **({"temperature": 1.0, "top_k": None, "top_p": None} | options), rngs=rngs).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_p=0.5) == {0}
    assert drawn(top_k=3, top_p=0.99) == {0, 1, 2}
    assert drawn(temperature=0) == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature is -1"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 1.5}, "top_p is 1.5")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        next(generate(build(small_config()), random_tokens(1, 3), 5, **options))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_or_no_tokens_are_refused_in_words(shape: tuple[int, int]) -> None:
    model, tokens = build(small_config(pattern="bmojo")), torch.zeros(shape, dtype=torch.long)
    for read in (model, model.prefill, lambda tokens: next(generate(model, tokens, 1))):
        with pytest.raises(ValueError, match="a row, and a token in each"):
            read(tokens)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed is"):
        next(generate(build(small_config(pattern="bmojo")), torch.zeros((1, 2), dtype=torch.long), 1, seed=seed))


@pytest.mark.parametrize(
    ("start", "at_a_time", "expected"),
    [(0, 9, [(0, 8), (8, 10)]), (3, 9, [(0, 1), (1, 9), (9, 10)]), (0, 1, [(0, 4), (4, 8), (8, 10)])],
)
def test_pieces_end_where_chunks_do(start, at_a_time, expected):
    assert list(pieces(start, 10, 4, at_a_time)) == expected


def test_a_gpu_reads_longer_pieces_of_fewer_rows():
    assert [piece_tokens(num_rows, on_gpu=True) for num_rows in (1, 4, 64)] == [32768, 8192, 2048]
    assert piece_tokens(1, on_gpu=False) == 2048

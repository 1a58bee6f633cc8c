"""Documents read inside decoding: one softmax over all, the set that is kept, states composed, rows apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo.generation import continue_from, generate
from bmojo.long_term import LongTermMemory, RememberedDocument, compose, eidetic_layers, read, remember
from bmojo.mixers.long_term import EideticTokens, ExactIndex, LongTermReader
from bmojo.state import DecodingState
from kernels.memory_attention import KeysValues, Slots, StepInputs, memory_attention_step
from tests.bmojo.model_family import build, configs, random_tokens, small_config

few = settings(max_examples=20, deadline=None)
EIDETIC_PATTERNS = ("bmojo*2", "mamba2,bmojo", "mamba2,bmojo,swa", "bmojo,attention")
exact = {"rtol": 0, "atol": 1e-10}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(num_documents: int, num_tokens: int = 3, seed: int = 7) -> EideticTokens:
    """Random tokens of 2 key/value heads with 8 channels; the last slot of every other document is empty."""
    position = torch.arange(num_documents * num_tokens).view(num_documents, num_tokens)
    position[::2, -1] = -1
    shape = (num_documents, num_tokens, 2, 8)
    return EideticTokens(normal(*shape, seed=seed), normal(*shape, seed=seed + 1), position)


def step_inputs() -> StepInputs:
    """Two rows: W = 4, rings of 6 and 8, three slots, all positions filled in the first row only."""
    fading = KeysValues(normal(2, 8, 2, 8, seed=3), normal(2, 8, 2, 8, seed=4))
    position = torch.tensor([[4, -1, 0], [-1, -1, -1]])
    slots = Slots(normal(2, 4, 8, seed=5), normal(2, 3, 2, 8, seed=6), normal(2, 3, 2, 8, seed=8), position)
    window = (normal(2, 4, 8), normal(2, 6, 2, 8, seed=1), normal(2, 6, 2, 8, seed=2))
    return StepInputs(*window, torch.tensor([17, 2]), fading, slots, window_size=4)


def dense(inputs: StepInputs, row: int, head: int, extra: list[tuple[torch.Tensor, torch.Tensor]]):
    """(out, share of the extra tokens) of one query over lists of keys and values, from the definition."""
    q_bhp, k, v, position_b, fading, slots, window_size = inputs
    assert fading is not None
    assert slots is not None
    assert window_size is not None
    group, now = head // 2, int(position_b[row])
    near = [i for i in range(now - window_size + 1, now + 1) if i >= 0]
    far = [i for i in range(now - 2 * window_size + 1, now - window_size + 1) if i >= 0]
    scores, values = [], []
    for ring_k, ring_v, positions in ((k, v, near), (*fading, far)):
        for i in positions:
            scores.append(q_bhp[row, head] @ ring_k[row, i % ring_k.shape[1], group])
            values.append(ring_v[row, i % ring_v.shape[1], group])
    for slot in range(3):
        if slots.position_bm[row, slot] >= 0:
            scores.append(slots.q_bhp[row, head] @ slots.k_bmhp[row, slot, group])
            values.append(slots.v_bmhp[row, slot, group])
    for key, value in extra:
        scores.append(slots.q_bhp[row, head] @ key[group])
        values.append(value[group])
    share = (torch.stack(scores) / 8**0.5).softmax(0)
    return share @ torch.stack(values), share[len(share) - len(extra) :].sum()


def test_one_softmax_reads_window_fading_slots_and_the_nearest_document():
    inputs, tokens = step_inputs(), stored(5)
    reader = LongTermReader(tokens, ExactIndex(tokens), torch.zeros(5), num_rows=2, num_read=1)
    out_bhp = reader.attend(inputs)
    assert inputs.eidetic is not None
    for row in range(2):
        share_hn = torch.zeros(4, 5, dtype=torch.float64)
        for head in range(4):  # of a query that reads the documents alone
            score_nm = (tokens.k_nmgp[:, :, head // 2] @ inputs.eidetic.q_bhp[row, head]) / 8**0.5
            weight_nm = score_nm.exp() * (tokens.position_nm >= 0)
            share_hn[head] = weight_nm.sum(1) / weight_nm.sum()
        nearest = int(share_hn.mean(0).argmax())
        extra = [(k, v) for k, v, position in zip(*(x[nearest] for x in tokens), strict=True) if position >= 0]
        expected = [dense(inputs, row, head, extra) for head in range(4)]
        torch.testing.assert_close(out_bhp[row], torch.stack([out for out, _ in expected]))
        share = torch.stack([share for _, share in expected]).mean()
        torch.testing.assert_close(reader.attention_bn[row, nearest].double(), share, rtol=1e-6, atol=0)
        assert (reader.attention_bn[row] > 0).sum() == 1


def test_hidden_documents_are_not_read():
    inputs, tokens = step_inputs(), stored(2)
    reader = LongTermReader(tokens, ExactIndex(tokens), torch.zeros(2), num_rows=2, num_read=2)
    reader.hidden_bn[:] = True
    torch.testing.assert_close(reader.attend(inputs), memory_attention_step(*inputs))
    assert not reader.attention_bn.any()


def test_an_old_document_is_forgotten_in_favour_of_an_equal_new_one():
    inputs, one = step_inputs(), stored(1)
    both = EideticTokens(*(torch.cat([x, x]) for x in one))
    for ages, nearest in (((100.0, 0.0), 1), ((0.0, 100.0), 0)):
        log_weight_n = -torch.tensor(ages) / 50.0
        reader = LongTermReader(both, ExactIndex(both), log_weight_n, num_rows=2, num_read=1)
        reader.attend(inputs)
        assert (reader.attention_bn[:, nearest] > 0).all()
        assert not reader.attention_bn[:, 1 - nearest].any()


def test_more_documents_than_channels_are_refused():
    model = build(small_config())
    documents = [remember(model, [token]).eidetic for token in range(5)]
    with pytest.raises(ValueError, match=r"5 documents cannot be read at a token: .* of which this model has 4"):
        LongTermMemory(model, documents, num_read=5)


@few
@given(config=configs(EIDETIC_PATTERNS), num_tokens=st.integers(1, 60))
def test_kept_are_the_best_of_the_whole_document(config, num_tokens):
    """Also those that are still in its window: the best by the rule over all positions, whatever the state holds."""
    model = build(config)
    tokens = random_tokens(1, num_tokens)
    document = remember(model, tokens[0].tolist())
    wide = config.replace(num_eidetic=num_tokens)  # the first eidetic layer keeps all: its scores are those of any M
    layer = min(eidetic_layers(model))
    all_of_it = build(wide)
    _, state = all_of_it.prefill(tokens)
    mixer = eidetic_layers(all_of_it)[layer]
    held = state.layers[layer]
    candidates = held.eidetic.before(num_tokens, held.window.before(num_tokens).v)
    scores = dict(zip(candidates.position[0].tolist(), candidates.log_e[0].tolist(), strict=True))
    tau = mixer.rule.tau(mixer.config)

    def rank(position: int) -> tuple[float, int]:
        score = scores[position] if tau is None else scores[position] * tau + position
        return score, -position

    fine = [position for position in range(num_tokens) if scores.get(position, float("-inf")) > float("-inf")]
    expected = sorted(fine, key=rank, reverse=True)[: config.num_eidetic]
    found = [position for position in document.eidetic[layer].position_nm[0].tolist() if position >= 0]
    assert found == expected


@few
@given(config=configs(EIDETIC_PATTERNS), chunks=st.integers(1, 9), into_chunk=st.integers(1, 4))
def test_a_documents_slots_read_from_the_store_are_its_slots(config, chunks, into_chunk):
    """Slots that are taken out of a state and read as a document give the same logits until the next update."""
    model, reading_model = build(config), build(config)
    num_tokens = chunks * config.chunk_size + min(into_chunk, config.chunk_size)
    _, state = model.prefill(random_tokens(1, num_tokens))
    emptied, documents = state.clone(), {}
    for layer in eidetic_layers(model):
        slots = state.layers[layer].eidetic.slots
        documents[layer] = EideticTokens(slots.k, slots.v, slots.position)
        emptied.layers[layer].eidetic.slots.position.fill_(-1)
    memory = LongTermMemory(reading_model, [documents], num_read=1)
    with memory.read_by(torch.zeros(1, 1, dtype=torch.bool)):
        for token in random_tokens(-num_tokens % config.chunk_size, 1, seed=1):
            found, emptied = reading_model.step(token, emptied)
            expected, state = model.step(token, state)
            torch.testing.assert_close(found, expected, **exact)


@few
@given(config=configs(EIDETIC_PATTERNS), num_tokens=st.integers(1, 60), decayed=st.booleans())
def test_the_one_document_of_a_store_is_continued(config, num_tokens, decayed):
    """Composed and read whole: the state holds the document, so that it is not read once more."""
    model = build(config)
    tokens = random_tokens(1, num_tokens)
    document = remember(model, tokens[0].tolist())
    memory = LongTermMemory(model, [document.eidetic])
    state = compose(model, [document], None if decayed else [0.25])
    _, expected_state = model.prefill(tokens)
    query = random_tokens(1, 30, seed=1)[0].tolist()
    found, state, attention = read(model, memory, query, state, torch.tensor([True]))
    for token in query:
        expected, expected_state = model.step(torch.tensor([token]), expected_state)
    torch.testing.assert_close(found, expected, **exact)
    assert not attention.any()


def recurrent_states(model, state: DecodingState) -> list[torch.Tensor]:
    return [layer.ssm.ssm if hasattr(layer.ssm, "ssm") else layer.ssm for layer in state.layers[:1]]


@few
@given(
    pattern=st.sampled_from(["mamba2,bmojo", "bmojo*2"]), lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4)
)
def test_composed_by_decay_is_the_state_after_all_documents_in_a_row(pattern, lengths):
    """Exact for the recurrence: in the first layer, whose inputs are the tokens alone, and if no convolution reads
    across the borders."""
    model = build(small_config(pattern=pattern))
    mixer = model.blocks[0].mixer
    ssm = mixer.ssm if pattern.startswith("bmojo") else mixer
    with torch.no_grad():
        ssm.conv_weight[:, :-1] = 0
    parts = [random_tokens(1, length, seed=seed) for seed, length in enumerate(lengths)]
    documents = [remember(model, part[0].tolist()) for part in parts]
    _, whole = model.prefill(torch.cat(parts, 1))
    (composed,), (expected,) = recurrent_states(model, compose(model, documents)), recurrent_states(model, whole)
    torch.testing.assert_close(composed, expected, **exact)


def test_composed_by_weights_is_their_mean_and_the_rest_is_the_last_documents():
    model = build(small_config(pattern="mamba2,bmojo"))
    first, last = (remember(model, random_tokens(1, length)[0].tolist()) for length in (20, 33))
    state = compose(model, [first, last], [1.0, 3.0])
    for path, x in state.tensors().items():
        ours, theirs = first.state.tensors()[path], last.state.tensors()[path]
        is_recurrent = path in ("layers.0.ssm", "layers.1.ssm.ssm")
        torch.testing.assert_close(x, 0.25 * ours + 0.75 * theirs if is_recurrent else theirs)


@pytest.mark.parametrize(
    ("pattern", "weights", "message"),
    [
        ("gated_deltanet,bmojo", None, "layer 0 is GatedDeltaNet, whose states are not composed by decay"),
        ("mamba3,bmojo", [1.0, 1.0], "layer 0 is Mamba3, whose states are not composed by weights"),
    ],
)
def test_states_that_cannot_be_composed_are_refused(pattern, weights, message):
    model = build(small_config(pattern=pattern))
    documents = [remember(model, random_tokens(1, 9, seed=seed)[0].tolist()) for seed in range(2)]
    with pytest.raises(ValueError, match=message):
        compose(model, documents, weights)


@pytest.mark.parametrize("pattern", EIDETIC_PATTERNS)
def test_rows_of_a_batch_read_as_if_alone(pattern):
    model = build(small_config(pattern=pattern))
    documents = [remember(model, random_tokens(1, 20 + seed, seed=seed)[0].tolist()) for seed in range(5)]
    memory = LongTermMemory(model, [document.eidetic for document in documents], num_read=2)
    queries = [random_tokens(1, length, seed=50 + length)[0].tolist() for length in (3, 9, 17)]
    hidden_bn = torch.zeros(3, 5, dtype=torch.bool)
    hidden_bn[1, 2] = True
    alone = [read(model, memory, query, None, hidden_n) for query, hidden_n in zip(queries, hidden_bn, strict=True)]
    state = DecodingState.join([state for _, state, _ in alone])
    more = random_tokens(6, 3, seed=3)
    with memory.read_by(hidden_bn) as reading:
        for tokens_b in more:
            logits_bv, state = model.step(tokens_b, state)
        attention_bn = reading.attention()
    for row, (query, hidden_n) in enumerate(zip(queries, hidden_bn, strict=True)):
        expected, _, attention_n = read(model, memory, [*query, *more[:, row].tolist()], None, hidden_n)
        torch.testing.assert_close(logits_bv[row : row + 1], expected, **exact)
        torch.testing.assert_close(attention_bn[row] + alone[row][2], attention_n)
    assert not attention_bn[1, 2]


def test_documents_change_what_is_read_and_are_let_go():
    model = build(small_config())
    document = remember(model, random_tokens(1, 40)[0].tolist())
    memory = LongTermMemory(model, [document.eidetic])
    query, nothing_hidden = random_tokens(1, 7, seed=1)[0].tolist(), torch.tensor([False])
    with_it, _, attention = read(model, memory, query, None, nothing_hidden)
    without, _ = model.prefill(torch.tensor([query]))
    assert (with_it - without).abs().max() > 1e-3
    assert 0 < attention[0] < len(query)
    again, _, _ = read(model, memory, query, None, torch.tensor([True]))
    torch.testing.assert_close(again, without, **exact)
    assert all(mixer.long_term is None for mixer in eidetic_layers(model).values())


def test_a_model_without_eidetic_memory_is_refused():
    for fields in ({"pattern": "mamba2,bmojo_f"}, {"num_eidetic": 0}):
        with pytest.raises(ValueError, match="no layer with an eidetic memory"):
            remember(build(small_config(**fields)), [1, 2])


def test_an_oracle_is_refused():
    model = build(small_config(selection="oracle"))
    with pytest.raises(ValueError, match="selection is oracle"):
        remember(model, [1, 2])


def test_the_index_holds_no_second_copy_of_the_keys():
    tokens = stored(5)
    index = ExactIndex(tokens)
    shared = [x.untyped_storage().data_ptr() for x in vars(index).values() if isinstance(x, torch.Tensor)]
    assert tokens.k_nmgp.untyped_storage().data_ptr() in shared
    position = tokens.position_nm
    held = sum(x.numel() * x.element_size() for x in vars(index).values() if isinstance(x, torch.Tensor)) - sum(
        x.numel() * x.element_size() for x in [tokens.k_nmgp]
    )
    assert held <= position.numel() * position.element_size()


def test_what_a_document_is_remembered_by_does_not_depend_on_its_length():
    model = build(small_config(pattern="mamba2,bmojo"))

    def shapes(document: RememberedDocument) -> list[torch.Size]:
        tensors = [*document.state.tensors().values(), *document.log_decay.values()]
        return [x.shape for x in (*tensors, *(x for tokens in document.eidetic.values() for x in tokens))]

    assert shapes(remember(model, [1])) == shapes(remember(model, random_tokens(1, 3000)[0].tolist()))


def test_drawing_goes_on_from_a_state_as_from_its_prompt():
    model = build(small_config())
    prompt = random_tokens(2, 9)
    logits_bv, state = model.prefill(prompt)
    found = list(continue_from(model, logits_bv, state, 6, seed=3))
    torch.testing.assert_close(torch.stack(found), torch.stack(list(generate(model, prompt, 6, seed=3))))


def test_reading_goes_on_in_a_copy():
    model = build(small_config())
    document = remember(model, random_tokens(1, 20)[0].tolist())
    before = document.state.clone()
    memory = LongTermMemory(model, [document.eidetic])
    read(model, memory, [1, 2, 3], document.state, torch.tensor([False]))
    for path, x in document.state.tensors().items():
        assert torch.equal(x, before.tensors()[path])

"""Packed documents never see one another, and padding is a document nobody reads."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmojo import BMojoLM
from tests.bmojo.model_family import VOCAB_SIZE, build, configs, random_tokens, small_config

few = settings(max_examples=30, deadline=None)


def document_ids(lengths: list[int]) -> Tensor:
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]


def logits_and_gradients(
    model: BMojoLM, tokens: Tensor, docs: Tensor, weight_bt1: Tensor
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(tokens, doc_ids_bt=docs).logits_btv
    (logits * weight_bt1).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@few
@given(config=configs(), lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4), data=st.data())
def test_perturbing_one_document_moves_no_bit_of_another(config, lengths, data):
    model = build(config.replace(tie_embeddings=False), dtype=torch.float32)
    docs = document_ids(lengths)
    tokens = random_tokens(1, sum(lengths))
    chosen = data.draw(st.integers(0, len(lengths) - 1))
    others = (docs != chosen)[..., None]
    changed = torch.where(docs == chosen, (tokens + 1 + data.draw(st.integers(0, 9))) % VOCAB_SIZE, tokens)
    weight = others.float()
    logits, grads = logits_and_gradients(model, tokens, docs, weight)
    changed_logits, changed_grads = logits_and_gradients(model, changed, docs, weight)
    assert torch.equal(logits[others.expand_as(logits)], changed_logits[others.expand_as(logits)])
    for grad, changed_grad in zip(grads, changed_grads, strict=True):
        assert torch.equal(grad, changed_grad)


@few
@given(config=configs(), chunks=st.lists(st.integers(1, 5), min_size=2, max_size=3), last=st.integers(1, 9))
def test_documents_that_start_on_chunk_boundaries_are_as_if_alone(config, chunks, last):
    model = build(config)
    lengths = [n * config.chunk_size for n in chunks] + [last]
    tokens = random_tokens(1, sum(lengths))
    packed = model(tokens, doc_ids_bt=document_ids(lengths)).logits_btv
    start = 0
    for length in lengths:
        alone = model(tokens[:, start : start + length]).logits_btv
        torch.testing.assert_close(packed[:, start : start + length], alone, rtol=0, atol=1e-10)
        start += length


@few
@given(config=configs(), lengths=st.lists(st.integers(1, 30), min_size=2, max_size=4))
def test_kept_positions_belong_to_the_document_of_their_chunk(config, lengths):
    config = config.replace(pattern="bmojo")
    docs = document_ids(lengths)
    memory = build(config)(random_tokens(1, sum(lengths)), doc_ids_bt=docs, return_memory=True).memory[0]
    for chunk, kept in enumerate(memory.kept_position_bjm[0].tolist()):
        first = chunk * config.chunk_size
        kept = [position for position in kept if position >= 0]
        assert len(set(kept)) == len(kept)
        assert all(position <= first - config.window_size for position in kept)
        assert all(docs[0, position] == docs[0, first] for position in kept)


@few
@given(config=configs(), length=st.integers(1, 25), left=st.integers(0, 3), right=st.integers(0, 9))
def test_padding_on_either_side_changes_nothing(config, length, left, right):
    """On the left in whole chunks: the eidetic set is updated at multiples of chunk_size of the row."""
    model = build(config)
    tokens = random_tokens(2, length)
    left *= config.chunk_size
    padded = torch.nn.functional.pad(tokens, (left, right), value=3)
    docs = torch.nn.functional.pad(torch.zeros_like(tokens), (left, right), value=-1)
    alone, among = model(tokens).logits_btv, model(padded, doc_ids_bt=docs).logits_btv
    torch.testing.assert_close(among[:, left : left + length], alone, rtol=0, atol=1e-10)


def test_a_batch_gives_each_row_what_it_gets_alone():
    model = build(small_config(pattern="mamba,mamba2,attention,swa,bmojo_f,bmojo"))
    tokens = random_tokens(3, 37)
    together = model(tokens).logits_btv
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model(tokens[row : row + 1]).logits_btv, rtol=0, atol=1e-10)

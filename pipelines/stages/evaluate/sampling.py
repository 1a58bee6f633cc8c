"""Text in, text out: a model's continuation of a prompt, piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import torch

from bmojo import BMojoLM
from bmojo.generation import generate
from data.tokenizer import Tokenizer


def continue_text(
    model: BMojoLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """Yield the continuation as it is drawn, ending with the document or after `max_new_tokens`.

    The prompt begins a document: the model sees the end-of-document token before it, as in training. Bytes that do not
    form UTF-8 appear as the replacement character.
    """
    device = next(model.parameters()).device
    prompt_ids = [tokenizer.eod_id, *(tokenizer.encode_batch([prompt])[0].tolist() if prompt else [])]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token_b in generate(
        model,
        torch.tensor([prompt_ids], device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=(tokenizer.eod_id,),
        num_token_ids=tokenizer.vocab_size,
    ):
        token = int(token_b[0])
        if token == tokenizer.eod_id:
            break
        yield decoder.decode(tokenizer.decode([token]))
    yield decoder.decode(b"", final=True)

"""Text in, text out: a model's continuations of prompts, whole, or of one prompt piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import torch

from bmojo import BMojoLM
from pipelines.stages.evaluate.language_model import Drawing, LanguageModel, NativeModel, TextTokenizer, beginning


def continue_text(model: BMojoLM, tokenizer: TextTokenizer, prompt: str, drawing: Drawing) -> Iterator[str]:
    """Yield the continuation as it is drawn, ending with the document or after `max_new_tokens`.

    The prompt begins a document: the model sees the end-of-document token before it, as in training. Bytes that do not
    form UTF-8 appear as the replacement character. A GPU works on the next token while one is read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token_b in _one_late(_drawn(NativeModel(model), tokenizer, [prompt], drawing)):
        token = int(token_b[0])
        if token == tokenizer.eod_id:
            break
        yield decoder.decode(tokenizer.decode([token]))
    yield decoder.decode(b"", final=True)


def continue_texts(
    model: LanguageModel, tokenizer: TextTokenizer, prompts: Sequence[str], drawing: Drawing
) -> list[str]:
    """The continuation of each prompt, drawn side by side; as continue_text."""
    texts = []
    for ids in torch.stack(list(_drawn(model, tokenizer, prompts, drawing)), dim=1).tolist():
        end = ids.index(tokenizer.eod_id) if tokenizer.eod_id in ids else len(ids)
        texts.append(tokenizer.decode(ids[:end]).decode("utf-8", "replace"))
    return texts


def _drawn(
    model: LanguageModel, tokenizer: TextTokenizer, prompts: Sequence[str], drawing: Drawing
) -> Iterator[torch.Tensor]:
    """The tokens of all rows, one position after the other."""
    rows = [[*beginning(tokenizer), *ids.tolist()] for ids in tokenizer.encode_batch(list(prompts))]
    most = max(map(len, rows))
    prompt_bt = torch.tensor([[tokenizer.eod_id] * (most - len(row)) + row for row in rows], device=model.device)
    valid_bt = torch.tensor([[False] * (most - len(row)) + [True] * len(row) for row in rows], device=model.device)
    return model.generate(
        prompt_bt,
        drawing,
        valid_bt=valid_bt if len(rows) > 1 else None,
        stop_tokens=(tokenizer.eod_id,),
        num_token_ids=tokenizer.vocab_size,
    )


def _one_late(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same, each after the next one was begun."""
    previous = None
    for tensor in tensors:
        if previous is not None:
            yield previous
        previous = tensor
    if previous is not None:
        yield previous

"""Tokens as pieces of text that can be shown one by one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from data.tokenizer import Tokenizer


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token shows as. A character that spans tokens shows at its last one, its first bytes as ⟨e2⟩."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = []
    for token in ids:
        if token == tokenizer.eod_id:
            pieces.append(decoder.decode(b"", final=True) + tokenizer.end_of_document)
            decoder.reset()
            continue
        content = tokenizer.decode([token])
        pieces.append(decoder.decode(content) or "".join(f"⟨{byte:02x}⟩" for byte in content))
    return pieces

"""Tokens as pieces of text that can be shown one by one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from data.tokenizer import Tokenizer


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token shows as. A character that spans tokens shows at its last one, and the others as nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = []
    for token in ids:
        if token == tokenizer.eod_id:
            pieces.append(decoder.decode(b"", final=True) + tokenizer.end_of_document)
            decoder.reset()
        else:
            pieces.append(decoder.decode(tokenizer.decode([token])))
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces


def shown_at(pieces: Sequence[str]) -> list[int]:
    """For each token the one at which its text shows: itself, or the last of the character that it is a part of."""
    places, place = [], len(pieces) - 1
    for token in reversed(range(len(pieces))):
        place = token if pieces[token] else place
        places.append(place)
    return places[::-1]

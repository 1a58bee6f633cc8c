"""Layer patterns: the short form that names the mixer of every layer.

    bmojo*12                  twelve B'MOJO layers
    (mamba2,swa)*6            twelve layers, Mamba-2 and sliding-window attention in turn
    (mamba*3,attention)*2,swa groups nest; commas join

Grammar:  pattern = item ("," item)*      item = (name | "(" pattern ")") ("*" count)?
"""

from __future__ import annotations

import re

MAX_LAYERS = 1024

_TOKEN = re.compile(r"\s*([a-z][a-z0-9_]*|\d+|[(),*])")


def expand_pattern(pattern: str) -> tuple[str, ...]:
    """Name of each layer's mixer, first to last.

    Raises: ValueError: the pattern does not follow the grammar or has too many layers.
    """
    tokens = _tokenize(pattern)
    layers, end = _parse_items(pattern, tokens, 0)
    if end != len(tokens):
        raise _syntax_error(pattern, f"unexpected {tokens[end]!r}")
    return tuple(layers)


def _tokenize(pattern: str) -> list[str]:
    tokens, at, text = [], 0, pattern.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _syntax_error(pattern, f"unexpected character {text[at:].strip()[0]!r}")
        tokens.append(match.group(1))
        at = match.end()
    return tokens


def _parse_items(pattern: str, tokens: list[str], at: int) -> tuple[list[str], int]:
    layers: list[str] = []
    while True:
        item, at = _parse_item(pattern, tokens, at)
        layers += item
        if len(layers) > MAX_LAYERS:
            raise ValueError(f"pattern {pattern!r} has more than {MAX_LAYERS} layers; is a repeat count mistyped?")
        if at == len(tokens) or tokens[at] != ",":
            return layers, at
        at += 1


def _parse_item(pattern: str, tokens: list[str], at: int) -> tuple[list[str], int]:
    if at == len(tokens):
        raise _syntax_error(pattern, "it ends where a mixer name is expected")
    if tokens[at] == "(":
        item, at = _parse_items(pattern, tokens, at + 1)
        if at == len(tokens) or tokens[at] != ")":
            raise _syntax_error(pattern, "a '(' is not closed")
    elif tokens[at][0].isalpha():
        item = [tokens[at]]
    else:
        raise _syntax_error(pattern, f"unexpected {tokens[at]!r} where a mixer name is expected")
    at += 1
    if at < len(tokens) and tokens[at] == "*":
        if at + 1 == len(tokens) or not tokens[at + 1].isdigit() or int(tokens[at + 1]) < 1:
            raise _syntax_error(pattern, "'*' needs a repeat count of 1 or more after it")
        if int(tokens[at + 1]) * len(item) > MAX_LAYERS:
            raise ValueError(f"pattern {pattern!r} has more than {MAX_LAYERS} layers; is a repeat count mistyped?")
        item = item * int(tokens[at + 1])
        at += 2
    return item, at


def _syntax_error(pattern: str, problem: str) -> ValueError:
    return ValueError(f"pattern {pattern!r}: {problem}. Write for example 'bmojo*12' or '(mamba2,swa)*6'.")

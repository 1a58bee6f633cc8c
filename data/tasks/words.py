"""Words that mean nothing, for tasks that are shown to models of text."""

from __future__ import annotations

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
_STEP = 1_000_003  # a prime: no word twice, and neighbours differ in every syllable


def made_up_words(number: int) -> list[str]:
    """Different words of two syllables (three, from 4,901 words on). The same ones every time."""
    length = 2
    while len(_SYLLABLES) ** length < number:
        length += 1
    return [_word(index * _STEP % len(_SYLLABLES) ** length, length) for index in range(number)]


def _word(number: int, length: int) -> str:
    syllables = []
    for _ in range(length):
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
    return "".join(syllables)

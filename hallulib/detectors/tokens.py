"""From clinical text to tokens: numbers with units, word stems, and what a negation covers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hallulib.detectors.lexicon import EXPANSIONS, UNITS, WORDS, stem

EMPTY_STEMS = frozenset(map(stem, WORDS["empty"].split()))
_NEGATIONS = frozenset(WORDS["negations"].split())
_NEGATION_ENDS = frozenset(WORDS["negation_ends"].split())
# a full stop ends a sentence unless it follows a title or stands inside a number
_SENTENCE = re.compile(r"(?:[^.!?\n;]|\.(?=\w)|(?<=\bDr)\.|(?<=\bMr)\.|(?<=\bMrs)\.|(?<=\bMs)\.)+")
_TOKEN = re.compile(r"\d+(?:[./:,]\d+)*%?|[a-z]+", re.IGNORECASE)
_PRESSURE = re.compile(r"\d{2,3}/\d{2,3}")
_PHRASES = [(re.compile(p, re.IGNORECASE), word) for p, word in [
    (r"\bfollow[- ]?up\b|\bf/u\b", "fu"),
    (r"\b(?:see|seen|come|comes|back)\b[^.]{0,20}\bagain\b|\bcomes? back\b", "fu"),
    (r"\bshortness of breath\b", "short breath"),
]]  # fmt: skip


@dataclass(frozen=True)
class Token:
    """A number with its unit ("10 mg"), or the stem of a word, and where it stands."""

    text: str
    start: int
    end: int
    is_number: bool
    negated: bool = False


def find_sentences(text: str, blank: bool = False) -> list[tuple[int, int]]:
    """Where the sentences of a text stand, without blanks around them.

    blank: also list pieces without a letter or digit (between a full stop and a line break).
    """
    spans = []
    for match in _SENTENCE.finditer(text):
        sentence = match.group()
        if blank or any(character.isalnum() for character in sentence):
            start = match.start() + len(sentence) - len(sentence.lstrip())
            spans.append((start, max(start, match.start() + len(sentence.rstrip()))))
    return spans


def read_tokens(sentence: str, offset: int = 0) -> list[Token]:
    """The numbers (with units) and word stems of one sentence; positions count from `offset`.

    Number words become digits, abbreviations are spelled out, and each token knows whether a
    negation covers it (NegEx, Chapman et al. 2001, in its simplest form).
    """
    raw = [(text, start + offset, end + offset) for text, start, end in _split(sentence)]
    tokens, negated, i = [], False, 0
    whole = re.search(r"\b(?:was|were|is|are|came back) negative\b", sentence) is not None
    while i < len(raw):
        text, start, end = raw[i]
        negated = text in _NEGATIONS or (negated and text not in _NEGATION_ENDS)
        number, used = _read_number(raw, i)
        if number:
            tokens.append(Token(number, start, raw[i + used - 1][2], True))
            if _PRESSURE.fullmatch(number):  # "Obs: 171/110" states a blood pressure unnamed
                tokens += [Token(stem(w), start, end, False) for w in ("blood", "pressure")]
            i += used
            continue
        for word in EXPANSIONS.get(text, text).split():
            covered = (negated and text not in _NEGATIONS) or word == "no" or whole
            tokens.append(Token(stem(word), start, end, False, covered))
        i += 1
    return tokens


def _split(sentence: str) -> list[tuple[str, int, int]]:
    """Raw tokens with their places. A phrase is replaced by the word it means, filled up with
    blanks so that what follows stays in place; its last token ends where the phrase ended."""
    ends: dict[int, int] = {}
    for pattern, word in _PHRASES:
        ends |= {m.start() + len(word): m.end() for m in pattern.finditer(sentence)}
        sentence = pattern.sub(lambda m, w=word: w.ljust(len(m.group())), sentence)
    return [
        (m.group().lower(), m.start(), ends.get(m.end(), m.end()))
        for m in _TOKEN.finditer(sentence)
    ]


def _read_number(raw: list[tuple[str, int, int]], i: int) -> tuple[str, int]:
    """(number with unit, raw tokens used), or ("", 0) where no number starts at i."""
    text, used, following = raw[i][0], 1, _next_word(raw, i)
    ones, tens = WORDS["numbers"], WORDS["tens"]
    if text[0].isdigit():
        value = _clean_digits(text)
    elif text in tens and 0 < ones.get(following, 0) < 10:
        value, used = str(tens[text] + ones[following]), 2
    elif text in tens or text in ones:
        value = str(tens[text] if text in tens else ones[text])
        if value == "1" and following not in UNITS:  # "one of the", "no one": not a quantity
            return "", 0
    else:
        return "", 0
    unit = _next_word(raw, i + used - 1)
    return (f"{value} {UNITS[unit]}", used + 1) if unit in UNITS else (value, used)


def _next_word(raw: list[tuple[str, int, int]], i: int) -> str:
    """The token right after token i: joined, or after one blank or hyphen ("BP 168/104, HR")."""
    return raw[i + 1][0] if i + 1 < len(raw) and raw[i + 1][1] - raw[i][2] <= 1 else ""


def _clean_digits(text: str) -> str:
    if text.endswith("%"):
        return _clean_digits(text[:-1]) + " percent"
    text = text.replace(",", "")
    if text.count(".") == 1 and "/" not in text and ":" not in text:
        text = text.rstrip("0").rstrip(".")
    return text

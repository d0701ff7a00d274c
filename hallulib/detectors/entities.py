"""A rule-based detector for any English clinical text: numbers, sides, negations, content words.

It reads the two texts and nothing else. A statement is supported when its numbers (with their
units), its sides and its content words stand in the note with the same polarity. It cannot know
that an illness belongs to a relative or that a drug was stopped, and it takes a paraphrase for an
invention: its errors are natural ones, and `measure_judge` measures them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from hallulib.detectors.base import Judgement, Source, StatementVerdict
from hallulib.detectors.lexicon import (
    EMPTY_WORDS,
    EXPANSIONS,
    NEGATION_ENDS,
    NEGATIONS,
    NUMBER_WORDS,
    OPPOSITES,
    TENS,
    UNITS,
)

# a full stop ends a sentence unless it follows a title or stands inside a number
_SENTENCE = re.compile(r"(?:[^.!?\n;]|\.(?=\w)|(?<=\bDr)\.|(?<=\bMr)\.|(?<=\bMrs)\.|(?<=\bMs)\.)+")
_CLAUSE_BREAK = re.compile(r",\s+(?:and\s+|or\s+|but\s+)?|\s+(?:and|but|or)\s+")
_TOKEN = re.compile(r"\d+(?:[./:,]\d+)*%?|[a-z]+", re.IGNORECASE)
_HEADING = re.compile(r"\s*[A-Za-z][A-Za-z /-]{0,30}:")
_PRESSURE = re.compile(r"\d{2,3}/\d{2,3}")
_PHRASES = [(re.compile(p, re.IGNORECASE), word) for p, word in [
    (r"\bfollow[- ]?up\b|\bf/u\b", "fu"),
    (r"\b(?:see|seen|come|comes|back)\b[^.]{0,20}\bagain\b|\bcomes? back\b", "fu"),
    (r"\bshortness of breath\b", "short breath"),
]]  # fmt: skip
LONG_CLAUSE = 4  # content words from which a clause may hold a paraphrase


@dataclass(frozen=True)
class Token:
    """A number with its unit ("10 mg"), or the stem of a word, where it stands, and whether a
    negation covers it."""

    text: str
    start: int
    end: int
    is_number: bool
    negated: bool = False


@dataclass(frozen=True)
class NoteIndex:
    """A note prepared for look-up: item -> polarities, item -> numbers of its sentences."""

    polarities: dict[str, set[bool]]
    sentences_of: dict[str, set[int]]
    sentences: list[str]


class EntitiesDetector:
    """Judges each clause of a summary by its numbers, sides, negations and content words.

    tolerance: the share of content words of a clause of four or more that may be missing from the
    note before the clause counts as not in the note. Numbers are never forgiven.
    """

    name = "entities"

    def __init__(self, tolerance: float = 0.25) -> None:
        self.tolerance = tolerance

    def judge(self, source: Source, summary: str) -> Judgement:
        note = index_note(source.text)
        statements = [
            self._judge_clause(note, summary, start, tokens, heading)
            for start, tokens, heading in split_clauses(summary)
        ]
        return Judgement(statements, [], self.name)

    def _judge_clause(
        self, note: NoteIndex, summary: str, start: int, tokens: list[Token], heading: list[Token]
    ) -> StatementVerdict:
        end = max(token.end for token in tokens)
        numbers = [t for t in tokens if t.is_number]
        words = [t for t in tokens if not t.is_number and t.text not in EMPTY_STEMS]
        kind = _name_kind(numbers, tokens)
        verdict, error_type, why = "supported", None, ""
        if not numbers and not words:
            words = heading or tokens
        for rule in (_find_opposite, _find_wrong_number, _find_wrong_polarity):
            found = rule(note, numbers, words)
            if found:
                verdict, error_type, why = found
                break
        else:
            missing = [t.text for t in words if t.text not in note.polarities]
            allowed = int(self.tolerance * len(words)) if len(words) >= LONG_CLAUSE else 0
            if len(missing) > allowed:
                verdict, error_type = "not_in_note", "fabrication"
                why = "not in the note: " + ", ".join(missing)
        evidence = why or find_evidence(note, tokens)
        return StatementVerdict(
            summary[start:end], start, end, kind, verdict, error_type, evidence
        )


def _find_opposite(note: NoteIndex, numbers: list[Token], words: list[Token]):
    """A side or sex that the note has only the other way round."""
    for token in words:
        other = OPPOSITES.get(token.text)
        if other in note.polarities and token.text not in note.polarities:
            return "contradicted", "detail", f"the note says {other}, not {token.text}"
    return None


def _find_wrong_number(note: NoteIndex, numbers: list[Token], words: list[Token]):
    """A number that the note lacks, or has only far from every word of this clause."""
    around = set().union(*(note.sentences_of.get(t.text, set()) for t in words))
    around |= {line + 1 for line in around}  # the answer to a question stands in the next line
    for token in numbers:
        where = note.sentences_of.get(token.text)
        if not where:
            return "not_in_note", "detail", f"not in the note: {token.text}"
        if around and not where & around:
            return "contradicted", "detail", f"{token.text} stands elsewhere in the note"
    return None


def _find_wrong_polarity(note: NoteIndex, numbers: list[Token], words: list[Token]):
    """A finding that the note only denies, or denies one that the note only states."""
    for token in words:
        stated = note.polarities.get(token.text)
        if stated and token.negated not in stated:
            state = "states" if token.negated else "denies"
            return "contradicted", "negation", f"the note {state} {token.text}"
    return None


def _name_kind(numbers: list[Token], tokens: list[Token]) -> str:
    if numbers:
        return "number"
    if any(token.text in ("left", "right", "bilateral") for token in tokens):
        return "side"
    return "negated finding" if any(token.negated for token in tokens) else "finding"


def find_evidence(note: NoteIndex, tokens: list[Token]) -> str:
    """The note's sentence that shares most items with the statement ("" if none does)."""
    votes: dict[int, int] = defaultdict(int)
    for token in tokens:
        for line in note.sentences_of.get(token.text, ()):
            votes[line] += token.text not in EMPTY_STEMS
    best = max(votes, key=lambda line: (votes[line], -line), default=None)
    return note.sentences[best] if best is not None and votes[best] else ""


@lru_cache(maxsize=4096)
def index_note(text: str) -> NoteIndex:
    """Prepare a note for look-up (cached: k samples of one note share it)."""
    polarities: dict[str, set[bool]] = defaultdict(set)
    sentences_of: dict[str, set[int]] = defaultdict(set)
    sentences = []
    for line, match in enumerate(_SENTENCE.finditer(text)):
        sentences.append(match.group().strip())
        asked = text[match.end() : match.end() + 1] == "?"  # a question neither states nor denies
        for token in read_tokens(match.group(), match.start()):
            polarities[token.text] |= {True, False} if asked else {token.negated}
            sentences_of[token.text].add(line)
    return NoteIndex(dict(polarities), dict(sentences_of), sentences)


def split_clauses(summary: str) -> list[tuple[int, list[Token], list[Token]]]:
    """Return (start, tokens, tokens of the heading) of each clause with something to check.

    The negation of "denies fever and chills" is found on the sentence, so it reaches both clauses.
    A heading ("Allergies: ...") belongs to its first clause and is judged only if it stands alone.
    """
    clauses = []
    for match in _SENTENCE.finditer(summary):
        sentence, offset = match.group(), match.start()
        heading = _HEADING.match(sentence)
        body = offset + (heading.end() if heading else 0)
        tokens = read_tokens(sentence, offset)
        titles = [token for token in tokens if token.end <= body]
        tokens = [token for token in tokens if token.start >= body] or titles
        breaks = [offset + m.start() for m in _CLAUSE_BREAK.finditer(sentence)]
        clauses += [(c[0].start, c, titles) for c in _cut(tokens, breaks)]
    return clauses


def _cut(tokens: list[Token], breaks: list[int]) -> list[list[Token]]:
    """Cut tokens at the break positions; a piece without content joins its neighbour."""
    pieces: list[list[Token]] = []
    for token in tokens:
        new = not pieces or any(pieces[-1][-1].end <= at <= token.start for at in breaks)
        if new and (not pieces or _has_content(pieces[-1])):
            pieces.append([token])
        else:
            pieces[-1].append(token)
    if len(pieces) > 1 and not _has_content(pieces[-1]):
        last = pieces.pop()
        pieces[-1] += last
    return pieces


def _has_content(tokens: list[Token]) -> bool:
    return any(token.is_number or token.text not in EMPTY_STEMS for token in tokens)


def read_tokens(sentence: str, offset: int = 0) -> list[Token]:
    """Read the numbers (with units) and word stems of one sentence; positions count from `offset`.

    Number words become digits, abbreviations are spelled out, and each token knows whether a
    negation covers it (NegEx, Chapman et al. 2001, in its simplest form).
    """
    raw = [(m.group().lower(), m.start() + offset, m.end() + offset) for m in _split(sentence)]
    tokens, negated, i = [], False, 0
    whole = re.search(r"\b(?:was|were|is|are|came back) negative\b", sentence) is not None
    while i < len(raw):
        text, start, end = raw[i]
        negated = text in NEGATIONS or (negated and text not in NEGATION_ENDS)
        number, used = _read_number(raw, i)
        if number:
            tokens.append(Token(number, start, raw[i + used - 1][2], True))
            if _PRESSURE.fullmatch(number):  # "Obs: 171/110" states a blood pressure unnamed
                tokens += [Token(stem(w), start, end, False) for w in ("blood", "pressure")]
            i += used
            continue
        for word in EXPANSIONS.get(text, (text,)):
            covered = (negated and text not in NEGATIONS) or word == "no" or whole
            tokens.append(Token(stem(word), start, end, False, covered))
        i += 1
    return tokens


def _split(sentence: str) -> list[re.Match[str]]:
    for pattern, word in _PHRASES:  # same length, so that positions stay true
        sentence = pattern.sub(lambda m, w=word: w.ljust(len(m.group())), sentence)
    return list(_TOKEN.finditer(sentence))


def _read_number(raw: list[tuple[str, int, int]], i: int) -> tuple[str, int]:
    """Return (number with unit, raw tokens used), or ("", 0) where no number starts at i."""
    text, used = raw[i][0], 1
    following = _next_word(raw, i)
    if text[0].isdigit():
        value = _clean_digits(text)
    elif text in TENS and 0 < NUMBER_WORDS.get(following, 0) < 10:
        value, used = str(TENS[text] + NUMBER_WORDS[following]), 2
    elif text in TENS or text in NUMBER_WORDS:
        value = str(TENS.get(text, NUMBER_WORDS.get(text, 0)))
        if value == "1" and following not in UNITS:  # "one of the", "no one": not a quantity
            return "", 0
    else:
        return "", 0
    unit = _next_word(raw, i + used - 1)
    if unit in UNITS:
        return f"{value} {UNITS[unit]}", used + 1
    return value, used


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


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Cut common English endings, so that "lasting" meets "lasts"."""
    for ending, replacement, shortest in [
        ("ies", "y", 5), ("sses", "ss", 6), ("ing", "", 6), ("ed", "", 5), ("ly", "", 6),
        ("es", "e", 5), ("s", "", 4),
    ]:  # fmt: skip
        is_plain = len(word) >= shortest and not word.endswith(("ss", "us", "is"))
        if is_plain and word.endswith(ending):
            word = word[: len(word) - len(ending)] + replacement
            break
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


EMPTY_STEMS = frozenset(stem(word) for word in EMPTY_WORDS)

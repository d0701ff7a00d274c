"""A rule-based detector for any English clinical text: numbers, sides, negations, terms, words.

A statement is supported when its numbers (with their units), sides, terms (drugs, conditions,
organisms, procedures) and other content words stand in the note with the same polarity. The rules
cannot know that an illness is a relative's or that a drug was stopped, and take a paraphrase for
an invention: their errors are natural ones, and `measure_judge` measures them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache

from hallulib.detectors.base import Judgement, Source, StatementVerdict
from hallulib.detectors.lexicon import WORDS, name_term
from hallulib.detectors.tokens import EMPTY_STEMS, Token, find_sentences, read_tokens

_CLAUSE_BREAK = re.compile(r",\s+(?:and\s+|or\s+|but\s+)?|\s+(?:and|but|or)\s+")
_HEADING = re.compile(r"[A-Za-z][A-Za-z /-]{0,30}:")
_QUESTION = re.compile(r"[^\S\n]*\?")
_DOSE_UNITS = {"mg", "mcg", "g", "ml", "unit", "mmol", "meq"}
_RULE_SCORE, _WORD_SCORE = 0.9, 0.7  # how sure: a broken rule or a missing term, missing words
_LONG_CLAUSE = 4  # content words from which a clause may hold a paraphrase, and then
_TOLERANCE = 0.25  # the share of them that may be missing from the note
_Found = tuple[str, str | None, str]  # verdict, error type, why
_Tokens = list[Token]


@dataclass(frozen=True)
class _NoteIndex:
    """A note prepared for look-up: item -> polarities, item -> numbers of its sentences."""

    text: str
    polarities: dict[str, set[bool]]
    sentences_of: dict[str, set[int]]
    spans: list[tuple[int, int]]


class EntitiesDetector:
    """Judges each clause of a summary by its numbers, sides, negations and content words."""

    name = "entities"

    def judge(self, source: Source, summary: str) -> Judgement:
        note, clauses = _index_note(source.text), _split_clauses(summary)
        statements = [_judge_clause(note, summary, *clause) for clause in clauses]
        return Judgement(statements, [], self.name)


def _judge_clause(
    note: _NoteIndex, summary: str, tokens: _Tokens, heading: _Tokens
) -> StatementVerdict:
    start, end = tokens[0].start, max(token.end for token in tokens)
    numbers = [t for t in tokens if t.is_number]
    words = [t for t in tokens if not t.is_number and t.text not in EMPTY_STEMS]
    if not numbers and not words:
        words = heading or tokens
    broken = _find_opposite(note, words) or _find_wrong_number(note, numbers, words)
    broken = broken or _find_wrong_polarity(note, words)
    found, score = (broken, _RULE_SCORE) if broken else _find_missing(note, words)
    verdict, error_type, why = found
    place = _find_evidence(note, tokens)
    evidence = why or (note.text[slice(*place)] if place else "")
    return StatementVerdict(
        summary[start:end], start, end, _name_kind(numbers, tokens), verdict, error_type, evidence,
        (place,) if place else (), score,
    )  # fmt: skip


def _find_missing(note: _NoteIndex, words: _Tokens) -> tuple[_Found, float]:
    """Words that the note lacks, and how sure that is. A term is never forgiven; of other words a
    share is in a long clause, for it may be a paraphrase."""
    missing = [t.text for t in words if t.text not in note.polarities]
    terms = [word for word in missing if name_term(word)]
    allowed = int(_TOLERANCE * len(words)) if len(words) >= _LONG_CLAUSE else 0
    score = _WORD_SCORE * len(missing) / max(1, len(words))
    if not terms and len(missing) <= allowed:
        return ("supported", None, ""), score
    why = "not in the note: " + ", ".join(terms or missing)
    return ("not_in_note", "fabrication", why), _RULE_SCORE if terms else score


def _find_opposite(note: _NoteIndex, words: _Tokens) -> _Found | None:
    """A side or sex that the note has only the other way round."""
    for token in words:
        other = WORDS["opposites"].get(token.text)
        if other in note.polarities and token.text not in note.polarities:
            return "contradicted", "detail", f"the note says {other}, not {token.text}"
    return None


def _find_wrong_number(note: _NoteIndex, numbers: _Tokens, words: _Tokens) -> _Found | None:
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


def _find_wrong_polarity(note: _NoteIndex, words: _Tokens) -> _Found | None:
    """A finding that the note only denies, or denies one that the note only states."""
    for token in words:
        stated = note.polarities.get(token.text)
        if stated and token.negated not in stated:
            state = "states" if token.negated else "denies"
            return "contradicted", "negation", f"the note {state} {token.text}"
    return None


def _name_kind(numbers: _Tokens, tokens: _Tokens) -> str:
    """What the statement is about: its number, else its side, negation or kind of term."""
    units = {token.text.partition(" ")[2] for token in numbers}
    if units & _DOSE_UNITS:
        return "dose"
    words = {token.text for token in tokens}
    if "year" in units and words & {"old", "man", "woman", "ag"}:  # stems; "ag" is age
        return "age"
    if numbers:
        return "number"
    if words & {"left", "right", "bilateral"}:
        return "side"
    if any(token.negated for token in tokens):
        return "negated finding"
    return next(filter(None, map(name_term, (t.text for t in tokens))), "finding")


def _find_evidence(note: _NoteIndex, tokens: _Tokens) -> tuple[int, int] | None:
    """Where the note's sentence stands that shares most items with the statement, if one does."""
    items = [token.text for token in tokens if token.text not in EMPTY_STEMS]
    votes = Counter(line for item in items for line in note.sentences_of.get(item, ()))
    best = min(votes, key=lambda line: (-votes[line], line), default=None)
    return None if best is None else note.spans[best]


@lru_cache(maxsize=4096)
def _index_note(text: str) -> _NoteIndex:
    """Prepare a note for look-up (cached: k samples of one note share it)."""
    polarities: dict[str, set[bool]] = defaultdict(set)
    sentences_of: dict[str, set[int]] = defaultdict(set)
    spans = find_sentences(text, blank=True)
    for line, (start, end) in enumerate(spans):
        asked = _QUESTION.match(text, end)  # a question neither states nor denies
        for token in read_tokens(text[start:end], start):
            polarities[token.text] |= {True, False} if asked else {token.negated}
            sentences_of[token.text].add(line)
    return _NoteIndex(text, dict(polarities), dict(sentences_of), spans)


def _split_clauses(summary: str) -> list[tuple[_Tokens, _Tokens]]:
    """(tokens, tokens of the heading) of each clause. A negation is found on the whole sentence and
    reaches both of "denies fever and chills"; a heading is judged only if it stands alone."""
    clauses = []
    for start, end in find_sentences(summary):
        sentence = summary[start:end]
        heading = _HEADING.match(sentence)
        body = start + (heading.end() if heading else 0)
        tokens = read_tokens(sentence, start)
        titles = [token for token in tokens if token.end <= body]
        tokens = [token for token in tokens if token.start >= body] or titles
        breaks = [start + m.start() for m in _CLAUSE_BREAK.finditer(sentence)]
        clauses += [(clause, titles) for clause in _cut(tokens, breaks)]
    return clauses


def _cut(tokens: _Tokens, breaks: list[int]) -> list[_Tokens]:
    """Cut tokens at the break positions; a piece without content joins its neighbour."""
    pieces: list[_Tokens] = []
    for token in tokens:
        cut = pieces and any(pieces[-1][-1].end <= at <= token.start for at in breaks)
        if not pieces or (cut and _has_content(pieces[-1])):
            pieces.append([])
        pieces[-1].append(token)
    if len(pieces) > 1 and not _has_content(pieces[-1]):
        last = pieces.pop()
        pieces[-1] += last
    return pieces


def _has_content(tokens: _Tokens) -> bool:
    return any(token.is_number or token.text not in EMPTY_STEMS for token in tokens)

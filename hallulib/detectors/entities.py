"""A rule-based detector for any English clinical text: numbers, sides, negations, terms, words.

It reads the two texts and nothing else. A statement is supported when its numbers (with their
units), its sides, its terms (drugs, conditions, organisms, procedures) and its other content words
stand in the note with the same polarity. It cannot know
that an illness belongs to a relative or that a drug was stopped, and it takes a paraphrase for an
invention: its errors are natural ones, and `measure_judge` measures them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from hallulib.detectors.base import Judgement, Source, StatementVerdict
from hallulib.detectors.lexicon import OPPOSITES
from hallulib.detectors.terms import name_term
from hallulib.detectors.tokens import EMPTY_STEMS, SENTENCE, Token, read_tokens

_CLAUSE_BREAK = re.compile(r",\s+(?:and\s+|or\s+|but\s+)?|\s+(?:and|but|or)\s+")
_HEADING = re.compile(r"\s*[A-Za-z][A-Za-z /-]{0,30}:")
DOSE_UNITS = {"mg", "mcg", "g", "ml", "unit", "mmol", "meq"}
RULE_SCORE, WORD_SCORE = 0.9, 0.7  # how sure: a broken rule or a missing term, missing words
LONG_CLAUSE = 4  # content words from which a clause may hold a paraphrase


@dataclass(frozen=True)
class NoteIndex:
    """A note prepared for look-up: item -> polarities, item -> numbers of its sentences."""

    polarities: dict[str, set[bool]]
    sentences_of: dict[str, set[int]]
    sentences: list[str]
    spans: list[tuple[int, int]]


class EntitiesDetector:
    """Judges each clause of a summary by its numbers, sides, negations and content words.

    tolerance: the share of content words of a clause of four or more that may be missing from the
    note before the clause counts as not in the note. Numbers and medical terms are never forgiven.
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
        if not numbers and not words:
            words = heading or tokens
        found = _find_error(note, numbers, words)
        score = RULE_SCORE if found else 0.0
        if not found:
            found, score = self._find_missing(note, words)
        verdict, error_type, why = found or ("supported", None, "")
        line = find_evidence(note, tokens)
        evidence = why or (note.sentences[line] if line is not None else "")
        spans = () if line is None else (note.spans[line],)
        return StatementVerdict(
            summary[start:end], start, end, kind, verdict, error_type, evidence, spans, score
        )

    def _find_missing(self, note: NoteIndex, words: list[Token]) -> tuple[tuple | None, float]:
        """Words that the note lacks. A term is never forgiven; of other words of a long clause a
        share is, for it may be a paraphrase."""
        missing = [t.text for t in words if t.text not in note.polarities]
        terms = [word for word in missing if name_term(word)]
        allowed = int(self.tolerance * len(words)) if len(words) >= LONG_CLAUSE else 0
        if not terms and len(missing) <= allowed:
            return None, WORD_SCORE * len(missing) / max(1, len(words))
        score = RULE_SCORE if terms else WORD_SCORE * len(missing) / len(words)
        why = "not in the note: " + ", ".join(terms or missing)
        return ("not_in_note", "fabrication", why), score


def _find_error(note: NoteIndex, numbers: list[Token], words: list[Token]) -> tuple | None:
    """The first rule that is broken, as (verdict, error type, why)."""
    for rule in (_find_opposite, _find_wrong_number, _find_wrong_polarity):
        found = rule(note, numbers, words)
        if found:
            return found
    return None


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
    """What the statement is about: its number, else its side, negation or kind of term."""
    units = {token.text.partition(" ")[2] for token in numbers}
    if units & DOSE_UNITS:
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


def find_evidence(note: NoteIndex, tokens: list[Token]) -> int | None:
    """The number of the note's sentence that shares most items with the statement, if one does."""
    votes: dict[int, int] = defaultdict(int)
    for token in tokens:
        for line in note.sentences_of.get(token.text, ()):
            votes[line] += token.text not in EMPTY_STEMS
    best = max(votes, key=lambda line: (votes[line], -line), default=None)
    return best if best is not None and votes[best] else None


@lru_cache(maxsize=4096)
def index_note(text: str) -> NoteIndex:
    """Prepare a note for look-up (cached: k samples of one note share it)."""
    polarities: dict[str, set[bool]] = defaultdict(set)
    sentences_of: dict[str, set[int]] = defaultdict(set)
    sentences, spans = [], []
    for line, match in enumerate(SENTENCE.finditer(text)):
        sentence = match.group().strip()
        start = text.index(sentence, match.start())
        sentences.append(sentence)
        spans.append((start, start + len(sentence)))
        asked = text[match.end() : match.end() + 1] == "?"  # a question neither states nor denies
        for token in read_tokens(match.group(), match.start()):
            polarities[token.text] |= {True, False} if asked else {token.negated}
            sentences_of[token.text].add(line)
    return NoteIndex(dict(polarities), dict(sentences_of), sentences, spans)


def split_clauses(summary: str) -> list[tuple[int, list[Token], list[Token]]]:
    """Return (start, tokens, tokens of the heading) of each clause with something to check.

    The negation of "denies fever and chills" is found on the sentence, so it reaches both clauses.
    A heading ("Allergies: ...") belongs to its first clause and is judged only if it stands alone.
    """
    clauses = []
    for match in SENTENCE.finditer(summary):
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

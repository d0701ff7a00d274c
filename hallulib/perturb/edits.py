"""Typed, minimal errors in clinical text: each edit changes one thing that the note says otherwise.

Rules only, so they work on any English clinical text and are wrong in known ways: they see words,
not sentences. What an edit writes never stands in the note in that place's words, so no edit turns
one true statement into another.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hallulib.detectors.lexicon import NUMBER_WORDS
from hallulib.perturb.lexicon import (
    BEFORE_A_LIST,
    BODY_PARTS,
    DOSE_UNITS,
    GROUPS,
    INVENTIONS,
    NEGATIONS,
    PATTERNS,
    SEXES,
    SIDE_ADJECTIVES,
    UNIT_SWAPS,
)

CHOICES = 8  # replacements offered per entity
FABRICATIONS = ("entity_added", "invented_finding")


@dataclass(frozen=True)
class Edit:
    """Replace `text[start:end]`, which is `before`, by `after`."""

    kind: str
    start: int
    end: int
    before: str
    after: str

    @property
    def error_type(self) -> str:
        """The edit's place in the taxonomy of the assessment."""
        if self.kind in FABRICATIONS:
            return "fabrication"
        return "negation" if self.kind == "negation" else "detail"

    def measure_growth(self, count: Callable[[str], int]) -> int:
        """What the text gains in length, in whatever `count` counts."""
        return count(f" {self.after}") - count(f" {self.before}")

    def apply(self, text: str) -> str:
        """The text with the error in it."""
        return text[: self.start] + self.after + text[self.end :]

    def describe(self) -> str:
        """The edit in a few words: "dose: 20 -> 40"."""
        before, after = self.before.strip(), self.after.strip()
        return f"{self.kind}: {before or '(nothing)'} -> {after or '(nothing)'}"


Finder = Callable[[str, str, random.Random], Iterator[Edit]]


def is_stated(note: str, phrase: str) -> bool:
    """Whether the words or the number stand in the note, case aside and not as a part of others."""
    note, phrase, at = f" {note.lower()}  ", phrase.lower(), 0
    while (at := note.find(phrase, at + 1)) > 0:
        before, after = note[at - 1], note[at + len(phrase) :][:2]
        inside = before.isalnum() or before == "." or after[0].isalnum()
        if not inside and not (after[0] == "." and after[1].isdigit()):
            return True
    return False


_NUMBER = r"(?<![\w./:-])\d+(?:\.\d+)?(?![\w:-]|[./]\d)"
_WORDS = "|".join(word for word, value in NUMBER_WORDS.items() if value > 1)
_AGE = re.compile(
    r"(?<![\w.])(\d{1,3})(?=[- ]?(?:years?|yrs?|y)[- ]?(?:old|of age|o)\b|[- ]?y/?o\b)"
    r"|(?<=\baged )(\d{1,3})\b|(?<=\bage )(\d{1,3})\b|(?<=\bage of )(\d{1,3})\b",
    re.IGNORECASE,
)
_DOSE = re.compile(rf"(?<![\w./-])(\d+(?:\.\d+)?)(?=\s?(?:{'|'.join(DOSE_UNITS)})\b(?!/))")
_UNIT = re.compile(
    rf"((?:\d|\b(?:{_WORDS}|one))[ -]?)"
    rf"({'|'.join(sorted(map(re.escape, UNIT_SWAPS), key=len, reverse=True))})\b(?!/)"
)
_PRESSURE = re.compile(r"(?<![\w./-])(\d{2,3})(?=/\d{2,3}\b(?!/))")
_PLAIN = re.compile(_NUMBER)
_WORD_NUMBER = re.compile(
    rf"\b({_WORDS})(?=[ -](?:hour|day|week|month|year|time|visit|tablet)s?\b)", re.IGNORECASE
)
_LIST_NUMBER = re.compile(r"(?:^|[\n.:;])\s*\d{1,2}[.)]\s$")
_SENTENCE_END = re.compile(r"(?<=[a-z\d)])(?<!\bDr)(?<!\bMr)(?<!\bMs)(?<!\bMrs)\.(?=\s|$)")
_SIDE = re.compile(r"\b(left|right)(?=[ -](\w+)(?:[ -](\w+))?)", re.IGNORECASE)
_SEX = re.compile(rf"(?<=\w )({'|'.join(SEXES)})\b", re.IGNORECASE)
_FLIPS = "|".join(sorted((re.escape(old) for old, _ in NEGATIONS), key=len, reverse=True))
# "reports no fever" is left alone: "denies no fever" may be read either way
_NEGATION = re.compile(rf"\b({_FLIPS})\b(?!\s+(?:\w+ing\s+)?(?:no|not|never)\b)", re.IGNORECASE)
_BARE_NO = re.compile(r"\b(no )(?=[a-z])(?!longer|more|one|later|less)", re.IGNORECASE)


def find_ages(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    for match in _AGE.finditer(text):
        value = int(match.group())
        for step in rng.sample([-19, -14, -11, -8, -6, 6, 8, 11, 14, 19], 10):
            if 1 <= value + step <= 99 and not is_stated(note, str(value + step)):
                yield _make_edit("age", match, str(value + step))


def find_doses(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    for match in _DOSE.finditer(text):
        for factor in rng.sample([0.1, 0.25, 0.5, 2, 3, 4, 10], 7):
            after = f"{float(match.group()) * factor:.4g}"
            if "e" not in after and not is_stated(note, after):
                yield _make_edit("dose", match, after)


def find_units(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    ages = [range(*match.span()) for match in _AGE.finditer(text)]
    for match in _UNIT.finditer(text):
        after = UNIT_SWAPS[match.group(2)]
        number = _read_number_before(text, match.end(1))
        is_age = any(match.start() in age for age in ages) or text[match.end() :].startswith(" old")
        if not is_age and not any(is_stated(note, number + gap + after) for gap in ("", " ")):
            yield Edit("unit", *match.span(2), match.group(2), after)


def _read_number_before(text: str, end: int) -> str:
    return re.search(r"[\w.]*[ -]?$", text[:end]).group().rstrip(" -")


def find_numbers(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    """Numbers that are no age, dose, year or number of a list: readings, results, durations."""
    taken = [m.span() for pattern in (_AGE, _DOSE) for m in pattern.finditer(text)]
    for match in [*_PRESSURE.finditer(text), *_PLAIN.finditer(text)]:
        span, value = match.span(), float(match.group())
        if span in taken or re.fullmatch(r"(?:19|20)\d\d|0+", match.group()):
            continue
        if _LIST_NUMBER.search(text[: span[1] + 2]):
            continue
        decimals = len(match.group().partition(".")[2])
        for factor in rng.sample([0.6, 0.7, 0.8, 1.2, 1.3, 1.4, 1.5], 7):
            after = f"{value * factor:.{decimals}f}"
            if float(after) not in (value, 0) and not is_stated(note, after):
                yield _make_edit("number", match, after)
    words = [word for word, value in NUMBER_WORDS.items() if 2 <= value <= 9]
    for match in _WORD_NUMBER.finditer(text):
        unit = text[match.end() :].split()[0].strip(".,")
        for word in rng.sample(words, len(words)):
            said = word != match.group().lower() and not is_stated(note, f"{word} {unit}")
            if said and not is_stated(note, f"{NUMBER_WORDS[word]} {unit}"):
                yield _make_edit("number", match, word)


def find_sides(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    for match in _SIDE.finditer(text):
        near = [word.lower() for word in match.groups()[1:] if word]
        names_part = near[0] in BODY_PARTS or (near[0] in SIDE_ADJECTIVES and near[1:] and
                                               near[1] in BODY_PARTS)  # fmt: skip
        after = {"left": "right", "right": "left"}[match.group(1).lower()]
        rest = text[match.end() + 1 :].split()[0].strip(".,;:)")
        if names_part and not is_stated(note, f"{after} {rest}"):
            yield _make_edit("side", match, after)


def find_sexes(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    """The first noun that names the patient's sex; the pronouns stay, as one slip would leave."""
    match = _SEX.search(text[:200])
    if match:
        yield _make_edit("sex", match, SEXES[match.group().lower()])


def find_negations(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    flips = dict(NEGATIONS)
    matched = list(_NEGATION.finditer(text))
    for match in matched:
        yield _make_edit("negation", match, flips[match.group().lower()])
    taken = {i for match in matched for i in range(*match.span())}
    for match in _BARE_NO.finditer(text):
        if match.start() not in taken:
            first = text[match.end()] if match.group()[0].isupper() else ""
            before = match.group() + first
            yield Edit("negation", match.start(), match.end() + len(first), before, first.upper())


def find_swapped_entities(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    for kind, match in _find_entities(text):
        for name in _draw_absent(kind, text, note, rng):
            yield _make_edit("entity_swapped", match, name)


def find_added_entities(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    """A second drug, illness or symptom before one that is there: "gout" -> "asthma and gout"."""
    for kind, match in _find_entities(text):
        said = re.findall(r"[\w,.:]+", text[: match.start()])[-1:]
        if kind != "relative" and (not said or said[0].lower() in BEFORE_A_LIST):
            for name in _draw_absent(kind, text, note, rng):
                yield Edit("entity_added", match.start(), match.start(), "", f"{name} and ")


def find_inventions(text: str, note: str, rng: random.Random) -> Iterator[Edit]:
    """A sentence about something of which the note says nothing, in place of one of the text's.

    In its place, not beside it: otherwise the longer text would be the wrong one. A text of one
    sentence keeps it and gets one more.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    spans = list(zip(ends, ends[1:], strict=False)) or [(end, end) for end in ends]
    for kind, sentence in rng.sample(INVENTIONS, len(INVENTIONS)):
        for name in _draw_absent(kind, text, note, rng)[:2]:
            after = " " + sentence.format(name)
            yield from (Edit("invented_finding", *s, text[s[0] : s[1]], after) for s in spans)


FINDERS: dict[str, Finder] = {
    "number": find_numbers, "dose": find_doses, "unit": find_units, "side": find_sides,
    "negation": find_negations, "age": find_ages, "sex": find_sexes,
    "entity_swapped": find_swapped_entities, "entity_added": find_added_entities,
    "invented_finding": find_inventions,
}  # fmt: skip


def find_edits(text: str, note: str, rng: random.Random) -> dict[str, list[Edit]]:
    """Every edit that the rules can make in `text`, by kind; kinds without one are left out."""
    found = {kind: list(finder(text, note, rng)) for kind, finder in FINDERS.items()}
    return {kind: edits for kind, edits in found.items() if edits}


def _find_entities(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    for kind, pattern in PATTERNS.items():
        for match in pattern.finditer(text):
            yield kind, match


def _draw_absent(kind: str, text: str, note: str, rng: random.Random) -> list[str]:
    """Names of a kind of which neither the note nor the text says anything, under any name."""
    stated = {match.lower() for match in PATTERNS[kind].findall(f"{note}\n{text}")}
    absent = [group[0] for group in GROUPS[kind] if stated.isdisjoint(map(str.lower, group))]
    return rng.sample(absent, min(CHOICES, len(absent)))


def _make_edit(kind: str, match: re.Match[str], after: str) -> Edit:
    before = match.group()
    if before[0].isupper() and after[0].islower():
        after = after[0].upper() + after[1:]
    return Edit(kind, match.start(), match.end(), before, after)

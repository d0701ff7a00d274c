"""Typed, minimal errors in clinical text: each edit changes one thing that the note says otherwise.

Rules only, so they work on any English clinical text and are wrong in known ways: they see words,
not sentences. What an edit writes never stands in the note in that place's words, so no edit turns
one true statement into another.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from hallulib.detectors.lexicon import ENTITIES, NUMBER_WORDS, WORDS
from hallulib.detectors.tokens import find_sentences

_MOST_SURPLUS = 12  # tokens by which the wrong sides may be longer, all together
_CHOICES = 8  # replacements offered per entity


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
        types = {"entity_added": "fabrication", "invented_finding": "fabrication"}
        return (types | {"negation": "negation"}).get(self.kind, "detail")

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


def choose_edits(
    texts: Iterable[tuple[str, str, str]], seed: int, count: Callable[[str], int]
) -> dict[str, Edit]:
    """One edit for each of (id, text, note) that the rules can change: id -> edit.

    count: the length of a piece of text, in tokens of the model that is to learn from it.

    Of the kinds a text allows, the one used least so far is taken, and of its edits the one that
    brings the growth of all texts together nearest to zero: length must not tell which side is
    wrong. While the wrong sides are longer by more than _MOST_SURPLUS, no text grows; one
    that allows nothing else is left out.
    """
    chosen: dict[str, Edit] = {}
    used: Counter[str] = Counter()
    surplus = 0
    count = lru_cache(maxsize=4096)(count)
    for name, text, note in texts:
        rng = random.Random(f"perturb-{seed}-{name}")
        found = find_edits(text, note, rng)
        for kind in sorted(rng.sample(list(found), len(found)), key=used.__getitem__):
            growths = [edit.measure_growth(count) for edit in found[kind]]
            place = min(range(len(growths)), key=lambda i: abs(surplus + growths[i]))
            if growths[place] > 0 and surplus > _MOST_SURPLUS:
                continue
            used[kind] += 1
            surplus += growths[place]
            chosen[name] = found[kind][place]
            break
    return chosen


def find_edits(text: str, note: str, rng: random.Random) -> dict[str, list[Edit]]:
    """Every edit that the rules can make in `text`, by kind; kinds without one are left out."""
    found = {
        kind: [_make_edit(kind, text, *change) for change in finder(text, note, rng)]
        for kind, finder in _FINDERS.items()
    }
    return {kind: edits for kind, edits in found.items() if edits}


def _make_edit(kind: str, text: str, span: tuple[int, int], after: str) -> Edit:
    before = text[slice(*span)]
    if before[:1].isupper() and after[:1].islower() and kind != "unit":  # mL is never ML
        after = after[0].upper() + after[1:]
    return Edit(kind, *span, before, after)


def _is_stated(note: str, phrase: str) -> bool:
    """Whether the words or the number stand in the note, case aside and not as a part of others."""
    note, phrase, at = f" {note.lower()}  ", phrase.lower(), 0
    while (at := note.find(phrase, at + 1)) > 0:
        before, after = note[at - 1], note[at + len(phrase) :][:2]
        inside = before.isalnum() or before == "." or after[0].isalnum()
        if not inside and not (after[0] == "." and after[1].isdigit()):
            return True
    return False


# --- the finders: each yields ((start, end), what comes there instead) -------------------------

_Change = tuple[tuple[int, int], str]


def _match_any(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first: "type 2 diabetes" is no "diabetes"."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_SWAPS = WORDS["unit_swaps"]
_WORDS = "|".join(word for word, value in NUMBER_WORDS.items() if value > 1)
_AGE = re.compile(
    r"(?<![\w.])(\d{1,3})(?=[- ]?(?:years?|yrs?|y)[- ]?(?:old|of age|o)\b|[- ]?y/?o\b)"
    r"|(?<=\baged )(\d{1,3})\b|(?<=\bage )(\d{1,3})\b|(?<=\bage of )(\d{1,3})\b",
    re.IGNORECASE,
)
_DOSE = re.compile(
    rf"(?<![\w./-])(\d+(?:\.\d+)?)(?=\s?(?:{_match_any(WORDS['dose_units'].split())})\b(?!/))"
)
_UNIT = re.compile(rf"((?:\d|\b(?:{_WORDS}|one))[ -]?)({_match_any(_SWAPS)})\b(?!/)")
_PRESSURE = re.compile(r"(?<![\w./-])(\d{2,3})(?=/\d{2,3}\b(?!/))")
_PLAIN = re.compile(r"(?<![\w./:-])\d+(?:\.\d+)?(?![\w:-]|[./]\d)")
_WORD_NUMBER = re.compile(
    rf"\b({_WORDS})(?=[ -](?:hour|day|week|month|year|time|visit|tablet)s?\b)", re.IGNORECASE
)
_LIST_NUMBER = re.compile(r"(?:^|[\n.:;])\s*\d{1,2}[.)]\s$")
_SIDE = re.compile(r"\b(left|right)(?=[ -](\w+)(?:[ -](\w+))?)", re.IGNORECASE)
_BODY_PARTS, _ADJECTIVES = WORDS["body_parts"].split(), WORDS["side_adjectives"].split()
_SEX = re.compile(rf"(?<=\w )({'|'.join(WORDS['sexes'])})\b", re.IGNORECASE)
# "reports no fever" is left alone: "denies no fever" may be read either way
_FLIP = re.compile(
    rf"\b({_match_any(WORDS['flips'])})\b(?!\s+(?:\w+ing\s+)?(?:no|not|never)\b)", re.IGNORECASE
)
_BARE_NO = re.compile(r"\b(no )(?=[a-z])(?!longer|more|one|later|less)", re.IGNORECASE)
_NAMES = {
    kind: re.compile(rf"\b(?:{_match_any(n for group in groups for n in group)})\b", re.IGNORECASE)
    for kind, groups in ENTITIES.items()
}


def _find_ages(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    for match in _AGE.finditer(text):
        for step in rng.sample([-19, -14, -11, -8, -6, 6, 8, 11, 14, 19], 10):
            value = int(match.group()) + step
            if 1 <= value <= 99 and not _is_stated(note, str(value)):
                yield match.span(), str(value)


def _find_doses(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    for match in _DOSE.finditer(text):
        for factor in rng.sample([0.1, 0.25, 0.5, 2, 3, 4, 10], 7):
            after = f"{float(match.group()) * factor:.4g}"
            if "e" not in after and not _is_stated(note, after):
                yield match.span(), after


def _find_units(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    ages = [range(*match.span()) for match in _AGE.finditer(text)]
    for match in _UNIT.finditer(text):
        after = _SWAPS[match.group(2)]
        number = re.search(r"[\w.]*[ -]?$", text[: match.end(1)]).group().rstrip(" -")
        is_age = any(match.start() in age for age in ages) or text[match.end() :].startswith(" old")
        if not is_age and not any(_is_stated(note, number + gap + after) for gap in ("", " ")):
            yield match.span(2), after


def _find_numbers(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """Numbers that are no age, dose, year or number of a list: readings, results, durations."""
    taken = [match.span() for pattern in (_AGE, _DOSE) for match in pattern.finditer(text)]
    for match in [*_PRESSURE.finditer(text), *_PLAIN.finditer(text)]:
        is_year_or_zero = re.fullmatch(r"(?:19|20)\d\d|0+", match.group())
        in_list = _LIST_NUMBER.search(text[: match.end() + 2])
        if match.span() in taken or is_year_or_zero or in_list:
            continue
        value, decimals = float(match.group()), len(match.group().partition(".")[2])
        for factor in rng.sample([0.6, 0.7, 0.8, 1.2, 1.3, 1.4, 1.5], 7):
            after = f"{value * factor:.{decimals}f}"
            if float(after) not in (value, 0) and not _is_stated(note, after):
                yield match.span(), after
    words = [word for word, value in NUMBER_WORDS.items() if 2 <= value <= 9]
    for match in _WORD_NUMBER.finditer(text):
        unit = text[match.end() :].split()[0].strip(".,")
        for word in rng.sample(words, len(words)):
            said = any(_is_stated(note, f"{value} {unit}") for value in (word, NUMBER_WORDS[word]))
            if word != match.group().lower() and not said:
                yield match.span(), word


def _find_sides(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """Left and right before a part of the body ("left the hospital" names no side)."""
    for match in _SIDE.finditer(text):
        side, first, second = ((word or "").lower() for word in match.groups())
        names_part = first in _BODY_PARTS or (first in _ADJECTIVES and second in _BODY_PARTS)
        after = {"left": "right", "right": "left"}[side]
        rest = text[match.end() + 1 :].split()[0].strip(".,;:)")
        if names_part and not _is_stated(note, f"{after} {rest}"):
            yield match.span(), after


def _find_sexes(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """The first noun that names the patient's sex; the pronouns stay, as one slip would leave."""
    match = _SEX.search(text[:200])
    if match:
        yield match.span(), WORDS["sexes"][match.group().lower()]


def _find_negations(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    matched = list(_FLIP.finditer(text))
    for match in matched:
        yield match.span(), WORDS["flips"][match.group().lower()]
    taken = {i for match in matched for i in range(*match.span())}
    for match in _BARE_NO.finditer(text):
        if match.start() not in taken:  # "No fever" becomes "Fever", with the capital moved
            first = text[match.end()] if match.group()[0].isupper() else ""
            yield (match.start(), match.end() + len(first)), first.upper()


def _find_swapped_entities(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    for kind, match in _find_entities(text):
        for name in _draw_absent(kind, text, note, rng):
            yield match.span(), name


def _find_added_entities(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """A second drug, illness or symptom before one that is there: "gout" -> "asthma and gout"."""
    for kind, match in _find_entities(text):
        said = re.findall(r"[\w,.:]+", text[: match.start()])[-1:]
        fits = not said or said[0].lower() in WORDS["before_a_list"].split()
        if kind != "relative" and fits:
            for name in _draw_absent(kind, text, note, rng):
                yield (match.start(), match.start()), f"{name} and "


def _find_inventions(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """A sentence about something of which the note says nothing, in place of one of the text's.

    In its place, not beside it: otherwise the longer text would be the wrong one. A text of one
    sentence keeps it and gets one more.
    """
    whole = re.compile(r"(?<=[a-z\d)])\.(?=\s|$)")  # ends as a sentence ends, not as "fever ." does
    ends = [end + 1 for _, end in find_sentences(text) if whole.match(text, end)]
    spans = list(zip(ends, ends[1:], strict=False)) or [(end, end) for end in ends]
    for kind, sentence in rng.sample(WORDS["inventions"], len(WORDS["inventions"])):
        for name in _draw_absent(kind, text, note, rng)[:2]:
            yield from ((span, " " + sentence.format(name)) for span in spans)


_FINDERS: dict[str, Callable[[str, str, random.Random], Iterator[_Change]]] = {
    "number": _find_numbers, "dose": _find_doses, "unit": _find_units, "side": _find_sides,
    "negation": _find_negations, "age": _find_ages, "sex": _find_sexes,
    "entity_swapped": _find_swapped_entities, "entity_added": _find_added_entities,
    "invented_finding": _find_inventions,
}  # fmt: skip


def _find_entities(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    return ((kind, match) for kind, names in _NAMES.items() for match in names.finditer(text))


def _draw_absent(kind: str, text: str, note: str, rng: random.Random) -> list[str]:
    """Names of a kind of which neither the note nor the text says anything, under any name."""
    stated = {match.lower() for match in _NAMES[kind].findall(f"{note}\n{text}")}
    absent = [group[0] for group in ENTITIES[kind] if stated.isdisjoint(map(str.lower, group))]
    return rng.sample(absent, min(_CHOICES, len(absent)))

"""Typed, minimal errors in clinical text: each edit changes one thing that the note says otherwise.

Rules only, so they work on any English clinical text and are wrong in known ways: they see words,
not sentences. What an edit writes never stands in the note in that place's words.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from hallulib.detectors.lexicon import ENTITIES, WORDS
from hallulib.detectors.tokens import find_sentences

_MOST_SURPLUS = 12  # tokens by which the wrong sides may be longer, all together
_CHOICES = 8  # replacements offered per entity
_ERROR_TYPES = {  # of the other kinds: detail
    "entity_added": "fabrication", "invented_finding": "fabrication", "negation": "negation",
}  # fmt: skip


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
        return _ERROR_TYPES.get(self.kind, "detail")

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

    Of the kinds a text allows, the one used least so far is taken, and of its edits the one that
    brings the growth of all texts together (in what `count` counts: tokens) nearest to zero: length
    must not tell which side is wrong. While the wrong sides are longer by more than _MOST_SURPLUS,
    no text grows; one that allows nothing else is left out.
    """
    chosen: dict[str, Edit] = {}
    used: Counter[str] = Counter()
    surplus, count = 0, lru_cache(maxsize=4096)(count)
    for name, text, note in texts:
        rng = random.Random(f"perturb-{seed}-{name}")
        found = find_edits(text, note, rng)
        for kind in sorted(rng.sample(list(found), len(found)), key=used.__getitem__):
            growths = [count(f" {edit.after}") - count(f" {edit.before}") for edit in found[kind]]
            place = min(range(len(growths)), key=lambda i: abs(surplus + growths[i]))
            if growths[place] <= 0 or surplus <= _MOST_SURPLUS:
                used[kind] += 1
                surplus += growths[place]
                chosen[name] = found[kind][place]
                break
    return chosen


def find_edits(text: str, note: str, rng: random.Random) -> dict[str, list[Edit]]:
    """Every edit that the rules can make in `text`, by kind; kinds without one are left out."""
    found = {
        kind: [
            _make_edit(kind, text, span, after)
            for span, after, *phrases in finder(text, note, rng)
            if not any(_is_stated(note, phrase) for phrase in phrases)
        ]
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
    words = rf"(?<![\w.]){re.escape(phrase)}(?!\w|\.\d)"
    return re.search(words, note, re.IGNORECASE) is not None


def _join(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first: "type 2 diabetes" is no "diabetes"."""
    return f"(?:{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})"


def _compile(pattern: str) -> re.Pattern[str]:
    """A pattern of words.yaml, in which <name> stands for any word of the list of that name."""
    lists = {k: words.split() if isinstance(words, str) else words for k, words in WORDS.items()}
    return re.compile(re.sub(r"<(\w+)>", lambda match: _join(lists[match[1]]), pattern))


_PATTERNS = {name: _compile(pattern) for name, pattern in WORDS["patterns"].items()}
_NAMES = {
    kind: re.compile(rf"\b{_join(name for group in groups for name in group)}\b", re.IGNORECASE)
    for kind, groups in ENTITIES.items()
}
# (start, end), what comes there instead, and in what words the note may already say so
_Change = tuple[tuple[int, int], str, *tuple[str, ...]]


def _look_for(name: str, text: str) -> Iterator[re.Match[str]]:
    return _PATTERNS[name].finditer(text)


def _find_ages(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    for match in _look_for("age", text):
        for step in rng.sample([-19, -14, -11, -8, -6, 6, 8, 11, 14, 19], 10):
            value = int(match.group()) + step
            if 1 <= value <= 99:
                yield match.span(), str(value), str(value)


def _find_doses(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    for match in _look_for("dose", text):
        for factor in rng.sample([0.1, 0.25, 0.5, 2, 3, 4, 10], 7):
            after = f"{float(match.group()) * factor:.4g}"
            if "e" not in after:
                yield match.span(), after, after


def _find_units(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    ages = {place for match in _look_for("age", text) for place in range(*match.span())}
    for match in _look_for("unit", text):
        after = WORDS["unit_swaps"][match.group(2)]
        number = re.search(r"[\w.]*[ -]?$", text[: match.end(1)]).group().rstrip(" -")
        if match.start() not in ages and not text[match.end() :].startswith(" old"):
            yield match.span(2), after, f"{number}{after}", f"{number} {after}"


def _find_numbers(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """Numbers that are no age, dose, year or number of a list: readings, results, durations."""
    taken = [m.span() for name in ("age", "dose") for m in _look_for(name, text)]
    for match in [*_look_for("pressure", text), *_look_for("number", text)]:
        in_list = _PATTERNS["list_number"].search(text[: match.end() + 2])
        if match.span() in taken or in_list or _PATTERNS["year_or_zero"].fullmatch(match.group()):
            continue
        value, decimals = float(match.group()), len(match.group().partition(".")[2])
        for factor in rng.sample([0.6, 0.7, 0.8, 1.2, 1.3, 1.4, 1.5], 7):
            after = f"{value * factor:.{decimals}f}"
            if float(after) not in (value, 0):
                yield match.span(), after, after
    for match in _look_for("counted", text):
        unit = text[match.end() :].split()[0].strip(".,")
        words = [word for word, value in WORDS["numbers"].items() if 2 <= value <= 9]
        for word in rng.sample(words, len(words)):
            if word != match.group().lower():
                yield match.span(), word, f"{word} {unit}", f"{WORDS['numbers'][word]} {unit}"


def _find_sides(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    for match in _look_for("side", text):
        after = {"left": "right", "right": "left"}[match.group().lower()]
        rest = text[match.end() + 1 :].split()[0].strip(".,;:)")
        yield match.span(), after, f"{after} {rest}"


def _find_sexes(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """The first noun that names the patient's sex; the pronouns stay, as one slip would leave."""
    if match := _PATTERNS["sex"].search(text[:200]):
        yield match.span(), WORDS["sexes"][match.group().lower()]


def _find_negations(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    matched = list(_look_for("flip", text))
    for match in matched:
        yield match.span(), WORDS["flips"][match.group().lower()]
    taken = {i for match in matched for i in range(*match.span())}
    for match in _look_for("bare_no", text):
        if match.start() not in taken:  # "No fever" becomes "Fever", with the capital moved
            first = text[match.end()] if match.group()[0].isupper() else ""
            yield (match.start(), match.end() + len(first)), first.upper()


def _find_entities(
    text: str, note: str, rng: random.Random, added: bool = False
) -> Iterator[_Change]:
    """Another thing of its kind in place of one; added: before it ("gout" -> "asthma and gout")."""
    found = [(kind, match) for kind, names in _NAMES.items() for match in names.finditer(text)]
    for kind, match in found:
        said = re.findall(r"[\w,.:]+", text[: match.start()])[-1:]
        fits = not said or said[0].lower() in WORDS["before_a_list"].split()
        if not added or (kind != "relative" and fits):
            for name in _draw_absent(kind, text, note, rng):
                yield ((match.start(),) * 2, f"{name} and ") if added else (match.span(), name)


def _find_inventions(text: str, note: str, rng: random.Random) -> Iterator[_Change]:
    """A sentence about something of which the note says nothing, in place of one of the text's.

    In its place, not beside it: otherwise the longer text would be the wrong one. A text of one
    sentence keeps it and gets one more.
    """
    stop = _PATTERNS["sentence_end"]
    ends = [end + 1 for _, end in find_sentences(text) if stop.match(text, end)]
    spans = list(zip(ends, ends[1:], strict=False)) or [(end, end) for end in ends]
    for kind, sentence in rng.sample(WORDS["inventions"], len(WORDS["inventions"])):
        for name in _draw_absent(kind, text, note, rng)[:2]:
            yield from ((span, " " + sentence.format(name)) for span in spans)


_FINDERS: dict[str, Callable[[str, str, random.Random], Iterator[_Change]]] = {
    "number": _find_numbers, "dose": _find_doses, "unit": _find_units, "side": _find_sides,
    "negation": _find_negations, "age": _find_ages, "sex": _find_sexes,
    "entity_swapped": _find_entities, "entity_added": partial(_find_entities, added=True),
    "invented_finding": _find_inventions,
}  # fmt: skip


def _draw_absent(kind: str, text: str, note: str, rng: random.Random) -> list[str]:
    """Names of a kind of which neither the note nor the text says anything, under any name."""
    stated = {match.lower() for match in _NAMES[kind].findall(f"{note}\n{text}")}
    absent = [group[0] for group in ENTITIES[kind] if stated.isdisjoint(map(str.lower, group))]
    return rng.sample(absent, min(_CHOICES, len(absent)))

"""The words that the rules know (words.yaml), the stem of a word, and the kind of term it names.

General clinical English, nothing of any one data set.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import yaml

WORDS: dict = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text("utf-8"))

NUMBER_WORDS: dict[str, int] = {
    word: value for value, word in enumerate(WORDS["numbers"].split())
}
TENS: dict[str, int] = {
    word: 10 * value for value, word in enumerate(WORDS["tens"].split(), start=2)
}
# spelling -> unit as the detector writes it
UNITS: dict[str, str] = {
    spelling: unit for unit, spellings in WORDS["units"].items() for spelling in spellings.split()
}
# what a clinician may write -> the words meant
EXPANSIONS: dict[str, tuple[str, ...]] = {
    spelling: tuple(meaning.split())
    for spellings, meaning in WORDS["expansions"].items()
    for spelling in spellings.split()
}
# names of things by kind, in the order of the list; a tuple holds the names of one thing
ENTITIES: dict[str, list[tuple[str, ...]]] = {
    kind: [tuple(name.strip() for name in entry.split("|")) for entry in text.split(",")]
    for kind, text in WORDS["entities"].items()
}
_SHORTEST = 6  # letters from which an ending says anything ("coma" is not a tumour)


def read_pairs(key: str) -> dict[str, str]:
    """A list of pairs, both ways round: {"left": "right", "right": "left", ...}."""
    pairs = [pair.split() for pair in WORDS[key].split(",")]
    return {old: new for a, b in pairs for old, new in ((a, b), (b, a))}


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


def _list_stems(kind: str) -> frozenset[str]:
    """The stems that name a term of a kind: its single words, and one-word names of such things."""
    names = [name.lower() for group in ENTITIES.get(kind, []) for name in group if name.isalpha()]
    words = WORDS["terms"][kind].split() + names
    return frozenset(stem(word) for word in words if word not in WORDS["not_terms"].split())


_STEMS = {kind: _list_stems(kind) for kind in WORDS["terms"]}
_ENDINGS = {
    kind: re.compile(rf"\w{{2,}}(?:{'|'.join(endings.split())})")
    for kind, endings in WORDS["endings"].items()
}


@lru_cache(maxsize=65536)
def name_term(stemmed: str) -> str:
    """Return "drug", "condition", "organism" or "procedure" for a word stem, "" for other words."""
    listed = next((kind for kind, stems in _STEMS.items() if stemmed in stems), "")
    if listed or len(stemmed) < _SHORTEST:
        return listed
    return next((kind for kind, ending in _ENDINGS.items() if ending.fullmatch(stemmed)), "")

"""The words that the rules know (words.yaml), the stem of a word, and the kind of term it names."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import yaml

WORDS: dict = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text("utf-8"))
UNITS, EXPANSIONS = (
    {word: to for words, to in WORDS[key].items() for word in words.split()}
    for key in ("units", "expansions")
)
# names of things by kind, in the order of the list; a tuple holds the names of one thing
ENTITIES: dict[str, list[tuple[str, ...]]] = {
    kind: [tuple(name.strip() for name in entry.split("|")) for entry in text.split(",")]
    for kind, text in WORDS["entities"].items()
}
_SHORTEST = 6  # letters from which an ending says anything ("coma" is not a tumour)
_CUTS = [  # ending, what replaces it, letters from which it is cut
    ("ies", "y", 5), ("sses", "ss", 6), ("ing", "", 6), ("ed", "", 5), ("ly", "", 6),
    ("es", "e", 5), ("s", "", 4),
]  # fmt: skip


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Cut common English endings, so that "lasting" meets "lasts"."""
    for ending, replacement, shortest in _CUTS:
        is_plain = len(word) >= shortest and not word.endswith(("ss", "us", "is"))
        if is_plain and word.endswith(ending):
            word = word.removesuffix(ending) + replacement
            break
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


def _list_stems(kind: str) -> frozenset[str]:
    """The stems that name a term of a kind: its single words, and one-word names of such things."""
    names = {name.lower() for group in ENTITIES.get(kind, []) for name in group if name.isalpha()}
    return frozenset(map(stem, names.union(WORDS["terms"][kind].split()) - _NOT_TERMS))


_NOT_TERMS = set(WORDS["not_terms"].split())
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

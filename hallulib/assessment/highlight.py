"""Which words of a note a sentence speaks of: its numbers and terms, found in the note."""

from __future__ import annotations

import re
from html import escape

_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:-[^\W\d_]+)*")
# Common words say nothing about where in the note to look.
_COMMON = frozenset(
    "with from have has had this that these those then than were was been being they their them "
    "patient patients takes take taking history denies denied aged years year days weeks months "
    "follow plan imaging allergies family noted shows showed after before about which when where "
    "and for the his her not also into over under until once twice daily".split()
)


def find_terms(sentence: str) -> set[str]:
    """Numbers and telling words of a sentence, in lower case; a plural's "s" is left out."""
    words = (found.group().lower() for found in _WORD.finditer(sentence))
    return {_stem(w) for w in words if w[0].isdigit() or len(w) > 3 and w not in _COMMON}


def mark_terms(source: str, sentence: str) -> str:
    """`source` as escaped HTML with the terms of `sentence` in <mark>."""
    terms, pieces, end = find_terms(sentence), [], 0
    for found in _WORD.finditer(source) if terms else ():
        if _stem(found.group().lower()) in terms:
            pieces.append(
                f"{escape(source[end : found.start()])}<mark>{escape(found.group())}</mark>"
            )
            end = found.end()
    return "".join([*pieces, escape(source[end:])])


def _stem(word: str) -> str:
    return word.removesuffix("s") if len(word) > 4 else word

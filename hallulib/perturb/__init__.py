"""Perturbed pairs: a faithful text against the same text with one typed, minimal error."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

from hallulib.perturb.edits import FINDERS, Edit, find_edits

MOST_SURPLUS = 12  # tokens by which the wrong sides may be longer, all together
KINDS = tuple(FINDERS)
__all__ = ["KINDS", "Edit", "choose_edits", "find_edits"]


def choose_edits(
    texts: Iterable[tuple[str, str, str]], seed: int, count: Callable[[str], int]
) -> dict[str, Edit]:
    """One edit for each of (id, text, note) that the rules can change: id -> edit.

    count: the length of a piece of text, in tokens of the model that is to learn from it.

    Of the kinds a text allows, the one used least so far is taken, and of its edits the one that
    brings the growth of all texts together nearest to zero: length must not tell which side is
    wrong. While the wrong sides are longer by more than MOST_SURPLUS, no text grows; one that
    allows nothing else is left out.
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
            if growths[place] > 0 and surplus > MOST_SURPLUS:
                continue
            used[kind] += 1
            surplus += growths[place]
            chosen[name] = found[kind][place]
            break
    return chosen

"""Several assessors on the same summaries: how far they agree, where they do not, and what an
adjudicator made of that."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from hallulib.assessment.agreement import compare_grades, compare_raters
from hallulib.assessment.events import Event
from hallulib.assessment.queue import Slotting
from hallulib.assessment.records import SessionRecord

Graded = dict[tuple[str, str], Event]


def collect_grades(record: SessionRecord) -> Graded:
    """(item id, system) -> the grade given at its first showing; mode single."""
    return {
        (slotting.item_id, slotting.systems[0]): entry.grades[1]
        for slotting, entry in zip(record.queue, record.state.entries, strict=True)
        if entry.done and slotting.repeat_of is None and 1 in entry.grades
    }


def compare_assessors(records: Sequence[SessionRecord]) -> dict:
    """Agreement between assessors: every two who graded the same summaries, and alpha over all.

    {assessors, pairs: [{first, second, n, agreed, share, kappa, ...}], alpha, alpha_text, n}
    """
    grades = [collect_grades(record) for record in records]
    shared = sorted({place for a, b in combinations(grades, 2) for place in a.keys() & b.keys()})
    pairs = []
    for (i, first), (j, second) in combinations(enumerate(grades), 2):
        both = sorted(first.keys() & second.keys())
        if not both:
            continue
        found = compare_grades(
            [first[place].verdict for place in both], [second[place].verdict for place in both]
        )
        names = {"first": records[i].header.assessor_id, "second": records[j].header.assessor_id}
        pairs.append(names | found.to_dict())
    rows = [[own[p].verdict if p in own else None for p in shared] for own in grades]
    alpha = compare_raters(rows) if shared else None
    return {
        "assessors": [record.header.assessor_id for record in records],
        "kind": records[0].header.assessor_kind if records else "",
        "n": len(shared),
        "pairs": pairs,
        "alpha": alpha and alpha.value,
        "alpha_text": alpha.text if alpha else "no items graded by two",
        "disagreements": len(find_disagreements(records)),
    }


def find_disagreements(records: Sequence[SessionRecord], seed: int = 0) -> list[Slotting]:
    """The summaries on which two assessors differ, in an order that tells nothing."""
    grades = [collect_grades(record) for record in records]
    places = sorted(set().union(*grades)) if grades else []
    split = [p for p in places if len({own[p].verdict for own in grades if p in own}) > 1]
    random.Random(f"adjudicate-{seed}").shuffle(split)
    return [Slotting(item, (system,)) for item, system in split]

"""What an assessor sees and in which order: chosen notes, balanced sides, unannounced repeats.

A queue is a list of the key's lines; who grades is given `Item`s, which name no system.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from hallulib.detectors.tokens import EMPTY_STEMS, find_sentences, stem
from hallulib.errors import SessionError
from hallulib.files import sha256_text

SYSTEMS = ("sft", "dpo")
# Notes are shown in blocks: each note once with one system, then once with the other. A session
# that is broken off thus still holds whole pairs.
NOTES_PER_BLOCK = 5
_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:-[^\W\d_]+)*")

Rows = dict[tuple[str, str], dict]  # (item id, system) -> row of generations.jsonl
Place = dict[str, Any]  # a line of the key: item_id, systems, repeat_of


class Sentence(NamedTuple):
    """One sentence of a summary: `summary[start:end] == text`; ids count from "s1"."""

    sid: str
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Item:
    """One thing to grade, without the name of any system: a note and one or two summaries."""

    place: int
    item_id: str
    source: str
    summaries: tuple[str, ...]

    @cached_property
    def sentences(self) -> list[Sentence]:
        """The sentences of the first summary."""
        return split_sentences(self.summaries[0])


def split_sentences(text: str) -> list[Sentence]:
    """The detectors' sentences, each with the marks that end it."""
    found = []
    for n, (start, end) in enumerate(find_sentences(text), start=1):
        end = len(text) - len(text[end:].lstrip(".!?;)]"))
        found.append(Sentence(f"s{n}", start, end, text[start:end]))
    return found


def mark_terms(source: str, sentence: str) -> list[tuple[str, bool]]:
    """`source` in pieces, and whether each is a number or telling word of `sentence`."""
    terms = {stem(word) for word in _WORD.findall(sentence.lower())} - EMPTY_STEMS
    pieces, end = [], 0
    for found in _WORD.finditer(source):
        if stem(found.group().lower()) in terms:
            pieces += [(source[end : found.start()], False), (found.group(), True)]
            end = found.end()
    return [*pieces, (source[end:], False)]


def plan_queue(rows: Rows, mode: str, items: int, seed: int, assessor: str) -> list[Place]:
    """Choose and order what is graded. The seed alone decides which notes are chosen, so that
    assessors can be compared; each has an own order.

    single: `items` summaries, every chosen note once per system, never twice in a row (unless it is
    the only one). ab: `items` notes with both summaries side by side, each system on the left
    equally often. Raises SessionError when no note has a summary of every system.
    """
    complete = sorted(item for item, system in rows if system == "sft" and (item, "dpo") in rows)
    if not complete:
        why = f"No note has summaries of all of {', '.join(SYSTEMS)}."
        raise SessionError(why, "Run notebook 06_evaluation.")
    count = min(items if mode == "ab" else max(1, items // 2), len(complete))
    if mode == "ab" and count > 1:
        count -= count % 2
    notes = random.Random(f"notes-{seed}-{mode}").sample(complete, count)
    rng = random.Random(f"order-{seed}-{mode}-{assessor}")
    rng.shuffle(notes)
    orders = rng.sample([SYSTEMS, SYSTEMS[::-1]], 2)
    sides = rng.sample([orders[i % 2] for i in range(count)], count)
    if mode == "ab":
        return [make_place(note, side) for note, side in zip(notes, sides, strict=True)]
    blocks = np.array_split(range(count), ceil(count / NOTES_PER_BLOCK))
    return [
        make_place(notes[i], [sides[i][turn]]) for block in blocks for turn in (0, 1) for i in block
    ]


def make_place(item_id: str, systems: Sequence[str]) -> Place:
    """A line of the key: whose summaries of which item are shown first (and second)."""
    return {"item_id": item_id, "systems": list(systems), "repeat_of": None}


def add_repeats(queue: list[Place], share: float, seed: int) -> list[Place]:
    """Repeat a share of the first half in the last third, unannounced, for intra-rater agreement;
    each system (in mode ab: the left one) equally often. `repeat_of`: the place of the first."""
    rng, half = random.Random(f"repeats-{seed}"), len(queue) // 2
    firsts = [[i for i in range(half) if queue[i]["systems"][0] == name] for name in SYSTEMS]
    each = min(round(share * len(queue) / 2), *map(len, firsts))
    longer, later = list(queue), max(len(queue) * 2 // 3, half)
    for original in [place for own in firsts for place in rng.sample(own, each)]:
        place = rng.randint(later + 1, len(longer))
        longer.insert(place, queue[original] | {"repeat_of": original})
    return longer


def fill_queue(queue: Sequence[Place], rows: Rows) -> list[Item]:
    """Look up the texts. Raises KeyError when a summary of the queue no longer exists."""
    items = []
    for n, line in enumerate(queue):
        found = [rows[line["item_id"], system] for system in line["systems"]]
        texts = tuple(row["text"] for row in found)
        items.append(Item(n, line["item_id"], found[0]["context"], texts))
    return items


def hash_items(items: Sequence[Item]) -> str:
    """sha256 of everything the assessor will see, in order."""
    return sha256_text(json.dumps([[i.item_id, i.source, *i.summaries] for i in items]))

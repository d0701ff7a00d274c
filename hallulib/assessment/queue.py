"""What an assessor sees and in which order: chosen notes, balanced sides, unannounced repeats.

A queue is a list of the key's lines: {"item_id", "systems", "repeat_of"}. Who grades is given the
items of `fill_queue`, which name no system.
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

from hallulib.detectors.tokens import EMPTY_STEMS, find_sentences, stem
from hallulib.errors import SessionError
from hallulib.files import sha256_text

SYSTEMS = ("sft", "dpo")
# Notes are shown in blocks: each note once with one system, then once with the other. A session
# that is broken off thus still holds whole pairs.
NOTES_PER_BLOCK = 5

_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:-[^\W\d_]+)*")

Rows = dict[tuple[str, str], dict]  # (item id, system) -> row of generations.jsonl
Place = dict[str, Any]  # a line of the key


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
    is_repeat: bool

    @cached_property
    def sentences(self) -> list[Sentence]:
        """The sentences of the first summary."""
        return split_sentences(self.summaries[0])


def split_sentences(text: str) -> list[Sentence]:
    """The detectors' sentences, each with the marks that end it."""
    spans = [
        (start, len(text) - len(text[end:].lstrip(".!?;)]"))) for start, end in find_sentences(text)
    ]
    return [Sentence(f"s{n}", *span, text[slice(*span)]) for n, span in enumerate(spans, start=1)]


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
    """Choose and order what is graded; the same arguments give the same queue. The seed alone
    decides which notes are chosen, so that assessors can be compared; each has an own order.

    single: `items` summaries, every chosen note once per system, never twice in a row (unless it is
    the only one). ab: `items` notes with both summaries side by side, each system on the left
    equally often (an odd number is rounded down).
    Raises SessionError when no note has a summary of every system.
    """
    known = [{item for item, system in rows if system == name} for name in SYSTEMS]
    complete = sorted(set.intersection(*known))
    if not complete:
        raise SessionError(
            f"No note has summaries of all of {', '.join(SYSTEMS)}.", "Run notebook 06_evaluation."
        )
    wanted = items if mode == "ab" else max(1, items // len(SYSTEMS))
    count = min(wanted, len(complete))
    if mode == "ab" and count > 1:
        count -= count % len(SYSTEMS)
    chosen = random.Random(f"notes-{seed}-{mode}").sample(complete, count)
    rng = random.Random(f"order-{seed}-{mode}-{assessor}")
    rng.shuffle(chosen)
    orders = rng.sample([SYSTEMS, SYSTEMS[::-1]], 2)
    sides = [orders[i % 2] for i in range(count)]
    rng.shuffle(sides)
    if mode == "ab":
        return [make_place(item, own) for item, own in zip(chosen, sides, strict=True)]
    queue: list[Place] = []
    blocks = ceil(count / NOTES_PER_BLOCK)
    for number in range(blocks):  # of equal size to within one, so that none holds a single note
        block = slice(count * number // blocks, count * (number + 1) // blocks)
        queue += _order_block(chosen[block], sides[block], rng)
    return queue


def make_place(item_id: str, systems: Sequence[str], repeat_of: int | None = None) -> Place:
    """A line of the key: whose summaries of which item are shown first (and second)."""
    return {"item_id": item_id, "systems": list(systems), "repeat_of": repeat_of}


def _order_block(notes: list[str], sides: list[tuple], rng: random.Random) -> list[Place]:
    block: list[Place] = []
    for turn in range(len(SYSTEMS)):
        one_pass = [make_place(item, [own[turn]]) for item, own in zip(notes, sides, strict=True)]
        rng.shuffle(one_pass)
        if block and one_pass[0]["item_id"] == block[-1]["item_id"]:
            one_pass.append(one_pass.pop(0))
        block += one_pass
    return block


def add_repeats(queue: list[Place], share: float, seed: int) -> list[Place]:
    """Repeat a share of the first half in the last third, unannounced, for intra-rater agreement.

    `repeat_of` is the place of the first showing, in the queue as returned. Pairs are repeated in
    twos, one of each order of sides, so that mode ab stays balanced.
    """
    count, half = min(round(share * len(queue)), len(queue) // 2), len(queue) // 2
    rng = random.Random(f"repeats-{seed}")
    if queue and len(queue[0]["systems"]) > 1:
        sides = [[i for i in range(half) if queue[i]["systems"][0] == name] for name in SYSTEMS]
        each = min(count // len(SYSTEMS), *map(len, sides))
        originals = [place for own in sides for place in rng.sample(own, each)]
    else:
        originals = rng.sample(range(half), count)
    later = max(len(queue) * 2 // 3, half)
    # Keys sort the repeats among the originals; nothing in the first half moves.
    placed = [(float(n), line) for n, line in enumerate(queue)]
    for original in originals:
        repeat = queue[original] | {"repeat_of": original}
        placed.append((later + rng.random() * (len(queue) - later), repeat))
    return [line for _, line in sorted(placed, key=lambda pair: pair[0])]


def fill_queue(queue: Sequence[Place], rows: Rows) -> list[Item]:
    """Look up the texts. Raises KeyError when a summary of the queue no longer exists."""
    items = []
    for n, line in enumerate(queue):
        found = [rows[line["item_id"], system] for system in line["systems"]]
        texts = tuple(row["text"] for row in found)
        repeated = line["repeat_of"] is not None
        items.append(Item(n, line["item_id"], found[0]["context"], texts, repeated))
    return items


def hash_items(items: Sequence[Item]) -> str:
    """sha256 of everything the assessor will see, in order."""
    return sha256_text(json.dumps([[i.item_id, i.source, *i.summaries] for i in items]))

"""What an assessor sees and in which order: the blinded queue, its key, and sentences."""

from __future__ import annotations

import json
import random
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from hallulib.errors import SessionError
from hallulib.files import sha256_text

# A sentence ends at . ! ? before a space and a capital, digit or bracket, or at a line break;
# not after a single letter ("t.i.d.") or the common abbreviations.
_BOUNDARY = re.compile(
    r"(?<=[.!?])(?<![\s.(][A-Za-z]\.)(?<!\bDr\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bvs\.)\s+(?=[A-Z0-9(])|\s*\n\s*"
)
# Notes are shown in blocks: each note once with one system, then once with the other. A session
# that is broken off thus still holds whole pairs.
_NOTES_PER_BLOCK = 5


@dataclass(frozen=True)
class Sentence:
    """One sentence of a summary: `summary[start:end] == text`; ids count from "s1"."""

    statement_id: str
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Entry:
    """One thing to grade, without the name of any system: a note and one or two summaries."""

    order_index: int
    item_id: str
    source: str
    summaries: tuple[str, ...]
    is_repeat: bool

    def sentences(self, slot: int = 1) -> list[Sentence]:
        """The sentences of the summary in `slot` (1 or 2)."""
        return split_sentences(self.summaries[slot - 1])


@dataclass(frozen=True)
class Slotting:
    """A line of the blind key: which system's summary stands in slot 1 (and 2)."""

    item_id: str
    systems: tuple[str, ...]
    repeat_of: int | None = None


def split_sentences(text: str) -> list[Sentence]:
    """Cut a summary into sentences with their offsets; blank ones are left out."""
    cuts = [0, *(position for m in _BOUNDARY.finditer(text) for position in m.span()), len(text)]
    found = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        piece = text[start:end]
        if piece.strip():
            start += len(piece) - len(piece.lstrip())
            end = start + len(piece.strip())
            found.append(Sentence(f"s{len(found) + 1}", start, end, text[start:end]))
    return found


def index_rows(rows: Iterable[dict]) -> dict[tuple[str, str], dict]:
    """Generation rows by (id, system). Raises SessionError on a duplicate, naming it."""
    indexed: dict[tuple[str, str], dict] = {}
    for row in rows:
        place = (str(row["id"]), row["system"])
        if place in indexed:
            raise SessionError(
                f"generations.jsonl holds item '{place[0]}' of system '{place[1]}' twice.",
                "Run notebook 06_evaluation again.",
            )
        indexed[place] = row
    return indexed


def plan_queue(
    rows: dict[tuple[str, str], dict], systems: tuple[str, ...], mode: str, items: int, seed: int,
    assessor: str = "",
) -> list[Slotting]:
    """Choose and order what is graded; the same arguments give the same queue. The seed alone
    decides which notes are chosen, so that assessors can be compared; each has an own order.

    single: `items` summaries, every chosen note once per system, never twice in a row (unless it is
    the only one).
    ab: `items` notes with both summaries side by side, each system on the left equally often (an
    odd number is rounded down).
    Raises SessionError when no note has a summary of every system.
    """
    known = [{item for item, system in rows if system == name} for name in systems]
    complete = sorted(set.intersection(*known))
    if not complete:
        raise SessionError(
            f"No note has summaries of all of {', '.join(systems)}.", "Run notebook 06_evaluation."
        )
    wanted = items if mode == "ab" else max(1, items // len(systems))
    count = min(wanted, len(complete))
    if mode == "ab" and count > 1:
        count -= count % len(systems)
    chosen = random.Random(f"notes-{seed}-{mode}").sample(complete, count)
    rng = random.Random(f"order-{seed}-{mode}-{assessor}")
    rng.shuffle(chosen)
    order = _balance_sides(len(chosen), systems, rng)
    if mode == "ab":
        return [Slotting(item, sides) for item, sides in zip(chosen, order, strict=True)]
    queue: list[Slotting] = []
    blocks = ceil(len(chosen) / _NOTES_PER_BLOCK)
    for number in range(blocks):  # of equal size to within one, so that none holds a single note
        block = slice(len(chosen) * number // blocks, len(chosen) * (number + 1) // blocks)
        queue += _order_block(chosen[block], order[block], rng)
    return queue


def _balance_sides(count: int, systems: tuple[str, ...], rng: random.Random) -> list[tuple]:
    """`count` orders of the systems: every rotation equally often (to within one), shuffled."""
    rotations = [systems[i:] + systems[:i] for i in range(len(systems))]
    rng.shuffle(rotations)
    sides = [rotations[i % len(rotations)] for i in range(count)]
    rng.shuffle(sides)
    return sides


def _order_block(notes: list[str], orders: list[tuple], rng: random.Random) -> list[Slotting]:
    block: list[Slotting] = []
    for turn in range(len(orders[0])):
        one_pass = [
            Slotting(item, (systems[turn],)) for item, systems in zip(notes, orders, strict=True)
        ]
        rng.shuffle(one_pass)
        if block and one_pass[0].item_id == block[-1].item_id:
            one_pass.append(one_pass.pop(0))
        block += one_pass
    return block


def add_repeats(queue: list[Slotting], share: float, seed: int) -> list[Slotting]:
    """Repeat a share of the first half in the last third, unannounced, for intra-rater agreement.

    `repeat_of` is the place of the first showing, in the queue as returned. Pairs are repeated in
    twos, one of each order of sides, so that mode ab stays balanced.
    """
    count = min(round(share * len(queue)), len(queue) // 2)
    rng = random.Random(f"repeats-{seed}")
    originals = _draw_originals(queue, count, rng)
    later = max(len(queue) * 2 // 3, len(queue) // 2)
    # Keys sort the repeats among the originals; nothing in the first half moves.
    placed = [(float(place), slotting) for place, slotting in enumerate(queue)]
    for original in originals:
        repeat = Slotting(queue[original].item_id, queue[original].systems, repeat_of=original)
        placed.append((later + rng.random() * (len(queue) - later), repeat))
    return [slotting for _, slotting in sorted(placed, key=lambda pair: pair[0])]


def _draw_originals(queue: list[Slotting], count: int, rng: random.Random) -> list[int]:
    """Places in the first half, `count` of them, the sides of pairs in equal numbers."""
    first_half = range(len(queue) // 2)
    sides = sorted({slotting.systems for slotting in queue})
    if not queue or len(queue[0].systems) == 1:
        return rng.sample(first_half, count)
    places = [[i for i in first_half if queue[i].systems == own] for own in sides]
    each = min(count // len(sides), *map(len, places))
    return [place for own in places for place in rng.sample(own, each)]


def fill_queue(queue: list[Slotting], rows: dict[tuple[str, str], dict]) -> list[Entry]:
    """Look up the texts. Raises SessionError when a summary of the queue no longer exists."""
    entries = []
    for place, slotting in enumerate(queue):
        try:
            found = [rows[slotting.item_id, system] for system in slotting.systems]
        except KeyError:
            raise SessionError(
                f"Item '{slotting.item_id}' is no longer among the evaluated summaries.",
                "The evaluation has been run again: start a new session under another name.",
            ) from None
        texts = tuple(row["text"] for row in found)
        is_repeat = slotting.repeat_of is not None
        entries.append(Entry(place, slotting.item_id, found[0]["context"], texts, is_repeat))
    return entries


def hash_entries(entries: list[Entry]) -> str:
    """sha256 of everything the assessor will see, in order."""
    return sha256_text(json.dumps([[e.item_id, e.source, *e.summaries] for e in entries]))


def write_blind_key(session_id: str, queue: list[Slotting]) -> str:
    """The key as text. A random salt keeps the key from being guessed through its hash."""
    lines = [
        {
            "order_index": place,
            "item_id": slotting.item_id,
            "slots": {str(n): system for n, system in enumerate(slotting.systems, start=1)},
            "repeat_of": slotting.repeat_of,
        }
        for place, slotting in enumerate(queue)
    ]
    key = {"schema_version": 1, "session_id": session_id, "salt": secrets.token_hex(16)}
    return json.dumps(key | {"queue": lines}, indent=1, ensure_ascii=False) + "\n"


def read_blind_key(text: str) -> list[Slotting]:
    """The queue of a key written by `write_blind_key`."""
    return [
        Slotting(line["item_id"], tuple(line["slots"].values()), line["repeat_of"])
        for line in json.loads(text)["queue"]
    ]

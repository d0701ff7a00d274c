"""Splits that never cut through a group (a document, a patient, or notes that are nearly alike)."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from hashlib import sha256

from hallulib.data.schema import SPLITS
from hallulib.errors import DataError

Row = dict[str, str]
ROOM = 1.2  # rows drawn per row wanted: merging groups later moves some to another split


def hash_share(seed: int, group_id: str, purpose: str = "split") -> float:
    """A number in [0, 1) from seed and group alone: adding rows never moves another group."""
    digest = sha256(f"{purpose}\x1f{seed}\x1f{group_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def choose_split(group_id: str, sizes: Mapping[str, int], seed: int) -> str:
    """The split of a group: its hash falls into a share of [0, 1) as wide as the split's size."""
    share, total, upto = hash_share(seed, group_id), sum(sizes.values()), 0.0
    for name in SPLITS:
        upto += sizes[name] / total
        if share < upto:
            return name
    return SPLITS[-1]


class GroupPool:
    """The whole groups of one split that come first in their random order, from a stream.

    It holds as few groups as reach `limit` references, so memory does not grow with the stream,
    and which ones it holds does not depend on the order in which rows arrive.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.members: dict[str, list[tuple[int, Row]]] = {}
        self.references: Counter[str] = Counter()
        self.total = 0
        self._heap: list[tuple[float, str]] = []

    def add(self, order: float, place: int, row: Row) -> None:
        """Take a row, and let the last groups go that are no longer needed, maybe its own."""
        group = row["group_id"]
        if group not in self.members:
            self.members[group] = []
            heapq.heappush(self._heap, (-order, group))
        self.members[group].append((place, row))
        self.references[group] += bool(row["reference"])
        self.total += bool(row["reference"])
        while self.total - self.references[self._heap[0][1]] >= self.limit:
            _, last = heapq.heappop(self._heap)
            self.total -= self.references.pop(last, 0)
            del self.members[last]


def draw_rows(
    rows: Iterable[Row], sizes: Mapping[str, int], seed: int, dropped: Counter[str]
) -> list[Row]:
    """Draw from a stream enough whole groups for the splits; the rows keep the stream's order.

    Rows without a reference (MedHal's non-factual ones) come with their group and do not count.
    What is not drawn is counted in `dropped`.
    """
    pools = {name: GroupPool(math.ceil(ROOM * sizes[name])) for name in SPLITS}
    read = Counter()
    for place, row in enumerate(rows):
        group = row["group_id"]
        read[bool(row["reference"])] += 1
        pool = pools[choose_split(group, sizes, seed)]
        pool.add(hash_share(seed, group, "order"), place, row)
    drawn = [pair for pool in pools.values() for group in pool.members.values() for pair in group]
    kept = Counter(bool(row["reference"]) for _, row in drawn)
    dropped["beyond_the_sizes"] += read[True] - kept[True]
    dropped["not_factual_beyond_the_sizes"] += read[False] - kept[False]
    return [row for _, row in sorted(drawn, key=lambda pair: pair[0])]


def split_rows(
    rows: Iterable[Row], sizes: Mapping[str, int], seed: int
) -> dict[str, list[Row]]:
    """Assign rows to splits by group, then cut each split to at most its size, whole groups first.

    sizes: rows wanted per split. With fewer rows than asked for, the shares stay in proportion.
    Raises DataError when a split would be empty.
    """
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        name = choose_split(row["group_id"], sizes, seed)
        splits[name].append(row | {"split": name})
    for name, members in splits.items():
        members.sort(key=lambda row: (hash_share(seed, row["group_id"], "order"), row["id"]))
        splits[name] = members[: sizes[name]]
        if not splits[name]:
            raise DataError(
                f"no rows for the {name} split: there are too few groups (documents or patients)",
                "give more rows, or rows with more than one group_id",
            )
    return splits


def find_leaks(splits: Mapping[str, Iterable[Row]], column: str) -> list[str]:
    """Values of a column (group_id, context) that stand in more than one split."""
    where: dict[str, set[str]] = defaultdict(set)
    for name, rows in splits.items():
        for row in rows:
            where[row[column]].add(name)
    return sorted(value for value, names in where.items() if len(names) > 1)

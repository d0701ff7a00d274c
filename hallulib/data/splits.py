"""Splits that never cut through a group: a document, a patient, or notes that are nearly alike.

Two notes are near-duplicates when the sets of their three-word sequences overlap by at least a
threshold (Jaccard index; Broder 1997). All pairs are compared exactly: the product of the sparse
table of notes and sequences with itself counts what each two of them share.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer

from hallulib.data.schema import SPLITS, Row, hash_context
from hallulib.errors import DataError

ROOM = 1.2  # rows drawn per row wanted: merging groups later moves some to another split
WORDS = 3
BLOCK = 200  # notes compared with all others at a time
_WORD = re.compile(r"\w+")


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


def draw_rows(
    rows: Iterable[Row], sizes: Mapping[str, int], seed: int, dropped: Counter[str]
) -> list[Row]:
    """Draw from a stream enough whole groups for the splits; the rows keep the stream's order.

    Which groups are drawn depends on their hashes, not on the order of the rows, and memory does
    not grow with the stream. Rows without a reference (MedHal's non-factual ones) come with their
    group and do not count. What is not drawn is counted in `dropped`.
    """
    held: list[Row] = []
    read: Counter[bool] = Counter()
    most = 100
    for row in rows:
        read[bool(row["reference"])] += 1
        held.append(row)
        if len(held) > most:
            held = _keep_first_groups(held, sizes, seed)
            most = max(most, 2 * len(held))
    held = _keep_first_groups(held, sizes, seed)
    kept = Counter(bool(row["reference"]) for row in held)
    dropped["beyond_the_sizes"] += read[True] - kept[True]
    dropped["not_factual_beyond_the_sizes"] += read[False] - kept[False]
    return held


def _keep_first_groups(rows: list[Row], sizes: Mapping[str, int], seed: int) -> list[Row]:
    """Of each split the groups that come first in their random order, until they have enough
    references. A group that falls out once never comes back: those before it only grow."""
    references: Counter[str] = Counter()
    for row in rows:
        references[row["group_id"]] += bool(row["reference"])
    kept, totals = set(), dict.fromkeys(SPLITS, 0)
    for group in sorted(references, key=lambda group: hash_share(seed, group, "order")):
        split = choose_split(group, sizes, seed)
        if totals[split] < ROOM * sizes[split]:
            totals[split] += references[group]
            kept.add(group)
    return [row for row in rows if row["group_id"] in kept]


def split_rows(rows: Iterable[Row], sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
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


def find_near_leaks(splits: Mapping[str, Iterable[Row]], threshold: float) -> list[str]:
    """First ids (groups) of notes that stand in more than one split in nearly the same words."""
    rows = [row | {"split": name} for name, members in splits.items() for row in members]
    merged, _ = merge_near_duplicates(rows, threshold)
    apart = {name: [row for row in merged if row["split"] == name] for name in splits}
    return find_leaks(apart, "group_id")


def _list_sequences(text: str) -> set[str]:
    """The sequences of three words of a text, case, spacing and signs left out."""
    words = _WORD.findall(text.lower())
    count = max(1, len(words) - WORDS + 1)
    return {" ".join(words[i : i + WORDS]) for i in range(count)}


def measure_similarity(a: str, b: str) -> float:
    """Jaccard index of the three-word sequences of two texts, 0 to 1."""
    left, right = _list_sequences(a), _list_sequences(b)
    return len(left & right) / len(left | right)


def find_near_duplicates(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield (i, j) of each two texts that are at least as similar as `threshold`, j < i."""
    table = CountVectorizer(analyzer=_list_sequences, dtype=np.int32).fit_transform(texts)
    sizes = np.asarray(table.sum(axis=1)).ravel()
    for start in range(0, len(texts), BLOCK):
        shared = (table[start : start + BLOCK] @ table.T).tocoo()
        i, j = shared.row + start, shared.col
        near = (j < i) & (shared.data >= threshold * (sizes[i] + sizes[j] - shared.data))
        yield from zip(i[near].tolist(), j[near].tolist(), strict=True)


def merge_near_duplicates(
    rows: Sequence[Row], threshold: float
) -> tuple[list[Row], dict[str, int]]:
    """Put rows with nearly the same note into one group: that of the first of them.

    The first keeps its group, and with it its split, so rows added at the end move none of the
    others, unless a new note ties two older groups together. Returns (rows, {merged_groups: groups
    that went into another one, largest_group: rows}).
    """
    groups = list(dict.fromkeys(row["group_id"] for row in rows))  # in the order they first occur
    number = {group: i for i, group in enumerate(groups)}
    notes: dict[str, Row] = {}
    ties = []
    for row in rows:
        first = notes.setdefault(hash_context(row["context"]), row)
        ties.append((number[first["group_id"]], number[row["group_id"]]))
    unique = list(notes.values())
    for i, j in find_near_duplicates([row["context"] for row in unique], threshold):
        ties.append((number[unique[i]["group_id"]], number[unique[j]["group_id"]]))
    left, right = np.array(ties).T
    graph = coo_array((np.ones(len(ties)), (left, right)), shape=(len(groups), len(groups)))
    _, component = connected_components(graph, directed=False)
    leaders: dict[int, str] = {}
    leader = {g: leaders.setdefault(c, g) for g, c in zip(groups, component, strict=True)}
    merged = [row | {"group_id": leader[row["group_id"]]} for row in rows]
    sizes = Counter(row["group_id"] for row in merged)
    return merged, {
        "merged_groups": len(groups) - len(leaders), "largest_group": max(sizes.values())
    }  # fmt: skip

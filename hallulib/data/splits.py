"""Splits that never cut through a group: a document, a patient, or notes that are nearly alike.

Two notes are near-duplicates when the sets of their three-word sequences overlap by at least a
threshold (Jaccard index; Broder 1997). All pairs are compared exactly: the product of the sparse
table of notes and sequences with itself counts what each two of them share.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer

from hallulib.data.schema import SPLITS, Row, hash_context
from hallulib.errors import DataError
from hallulib.files import sha256_text

ROOM = 1.2  # rows drawn per row wanted: merging groups later moves some to another split
WORDS = 3
BLOCK = 200  # notes compared with all others at a time


def hash_share(seed: int, group_id: str, purpose: str) -> float:
    """A number in [0, 1] from seed and group alone: adding rows never moves another group."""
    return int(sha256_text(f"{purpose}\x1f{seed}\x1f{group_id}")[:14], 16) / 2**56


def choose_split(group_id: str, sizes: Mapping[str, int], seed: int) -> str:
    """The split of a group: its hash falls into a share of [0, 1] as wide as the split's size."""
    place = hash_share(seed, group_id, "split") * sum(sizes.values())
    ends = accumulate(sizes[name] for name in SPLITS)
    return next((name for name, end in zip(SPLITS, ends, strict=True) if place < end), SPLITS[-1])


def draw_rows(
    rows: Iterable[Row], sizes: Mapping[str, int], seed: int, dropped: Counter[str]
) -> list[Row]:
    """Draw from a stream enough whole groups for the splits, by their hashes alone, in the stream's
    order; memory does not grow with the stream, and what is not drawn is counted in `dropped`.

    Rows without a reference (MedHal's non-factual ones) come with their group and do not count.
    """
    held: list[Row] = []
    left_out: Counter[bool] = Counter()
    rows = iter(rows)
    while batch := list(islice(rows, max(100, len(held)))):
        left_out.update(bool(row["reference"]) for row in batch)
        held = _keep_first_groups(held + batch, sizes, seed)
    left_out.subtract(bool(row["reference"]) for row in held)
    dropped["beyond_the_sizes"] += left_out[True]
    dropped["not_factual_beyond_the_sizes"] += left_out[False]
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
    """Assign rows to splits by group, at most `sizes[split]` to each, whole groups first; of fewer
    rows, the same shares. Raises DataError when a split is empty."""
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in sorted(rows, key=lambda r: (hash_share(seed, r["group_id"], "order"), r["id"])):
        name = choose_split(row["group_id"], sizes, seed)
        if len(splits[name]) < sizes[name]:
            splits[name].append(row | {"split": name})
    for name, members in splits.items():
        if not members:
            what = f"no rows for the {name} split: too few groups (documents or patients)"
            raise DataError(what, "give more rows, or rows with more than one group_id")
    return splits


def find_leaks(splits: Mapping[str, Iterable[Row]], column: str) -> list[str]:
    """Values of a column (group_id, context) that stand in more than one split."""
    found = Counter(v for rows in splits.values() for v in {row[column] for row in rows})
    return sorted(value for value, count in found.items() if count > 1)


def find_near_leaks(splits: Mapping[str, Iterable[Row]], threshold: float) -> list[str]:
    """First ids (groups) of notes that stand in more than one split in nearly the same words."""
    rows = [row | {"split": name} for name, members in splits.items() for row in members]
    merged, _ = merge_near_duplicates(rows, threshold)
    apart = {name: [row for row in merged if row["split"] == name] for name in splits}
    return find_leaks(apart, "group_id")


def _list_sequences(text: str) -> set[str]:
    """The sequences of three words of a text, case, spacing and signs left out."""
    words = re.findall(r"\w+", text.lower())
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
    """Put rows with nearly the same note into one group: that of the first of them, so that rows
    added at the end move none of the others, unless a new note ties two older groups together.

    Returns (rows, {merged_groups: groups that went into another, largest_group: rows}).
    """
    # one graph of groups and notes, numbered as they first occur: each row ties a note to a group
    group, groups = pd.factorize(pd.Series([row["group_id"] for row in rows]))
    note, notes = pd.factorize(pd.Series([hash_context(row["context"]) for row in rows]))
    texts = [rows[i]["context"] for i in np.unique(note, return_index=True)[1]]
    near = np.array(list(find_near_duplicates(texts, threshold)), dtype=int).reshape(-1, 2)
    ties = np.vstack([np.stack([group, note + len(groups)], axis=1), near + len(groups)])
    nodes = len(groups) + len(notes)
    graph = coo_array((np.ones(len(ties)), tuple(ties.T)), shape=(nodes, nodes))
    _, component = connected_components(graph, directed=False)
    first = pd.Series(groups).groupby(component[: len(groups)]).transform("first")
    merged = [row | {"group_id": name} for row, name in zip(rows, first[group], strict=True)]
    return merged, {
        "merged_groups": len(groups) - first.nunique(),
        "largest_group": int(first[group].value_counts().max()),
    }

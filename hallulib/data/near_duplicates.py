"""Notes that are nearly the same text: found by MinHash, put into one group.

Two notes are near-duplicates when the sets of their three-word sequences overlap by at least a
threshold (Jaccard index; Broder 1997). MinHash with locality-sensitive hashing (datasketch)
proposes pairs without comparing all with all, and each proposal is checked exactly.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from datasketch import MinHash, MinHashLSH

from hallulib.data.schema import hash_context

Row = dict[str, str]
WORDS = 3
PERMUTATIONS = 128
_WORD = re.compile(r"\w+")


@lru_cache(maxsize=512)
def make_shingles(text: str) -> frozenset[str]:
    """The sequences of three words of a text, case, spacing and signs left out."""
    words = _WORD.findall(text.lower())
    count = max(1, len(words) - WORDS + 1)
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(count))


def measure_similarity(a: str, b: str) -> float:
    """Jaccard index of the three-word sequences of two texts, 0 to 1."""
    left, right = make_shingles(a), make_shingles(b)
    return len(left & right) / len(left | right)


def find_near_duplicates(
    texts: Sequence[str], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, similarity) of near-duplicates, j < i.

    None is wrong. Few are missed: about 1 of 50 pairs right at a threshold of 0.8, and far fewer
    above it.
    """
    # Weighted towards recall: a wrong proposal costs a comparison, a missed one is a leak.
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.02, 0.98))
    for i, text in enumerate(texts):
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        sketch.update_batch([shingle.encode() for shingle in make_shingles(text)])
        for j in sorted(index.query(sketch)):
            similarity = measure_similarity(text, texts[j])
            if similarity >= threshold:
                yield i, j, similarity
        index.insert(i, sketch, check_duplication=False)


def merge_near_duplicates(
    rows: Sequence[Row], threshold: float
) -> tuple[list[Row], dict[str, int]]:
    """Put rows with nearly the same note into one group: that of the first of them.

    The first keeps its group, and with it its split, so rows added at the end move none of the
    others, unless a new note ties two older groups together. Returns (rows, {merged_groups: groups
    that went into another one, largest_group: rows}).
    """
    first_place = {row["group_id"]: place for place, row in reversed(list(enumerate(rows)))}
    firsts = {hash_context(row["context"]): row for row in reversed(rows)}
    unique = list(firsts.values())[::-1]
    leader: dict[str, str] = {}

    def find_leader(group: str) -> str:
        while group in leader:
            group = leader[group]
        return group

    same = ((row, firsts[hash_context(row["context"])]) for row in rows)
    near = find_near_duplicates([row["context"] for row in unique], threshold)
    for a, b in itertools.chain(same, ((unique[i], unique[j]) for i, j, _ in near)):
        pair = {find_leader(a["group_id"]), find_leader(b["group_id"])}
        if len(pair) == 2:
            early, late = sorted(pair, key=first_place.__getitem__)
            leader[late] = early
    merged = [row | {"group_id": find_leader(row["group_id"])} for row in rows]
    sizes = Counter(row["group_id"] for row in merged)
    return merged, {"merged_groups": len(leader), "largest_group": max(sizes.values())}


def find_near_leaks(
    splits: Mapping[str, Sequence[Row]], threshold: float
) -> list[tuple[str, str, float]]:
    """Pairs of rows (ids, similarity) with nearly the same note in different splits."""
    rows = [row for members in splits.values() for row in members]
    firsts = {(row["split"], hash_context(row["context"])): row for row in reversed(rows)}
    unique = list(firsts.values())[::-1]
    return [
        (unique[j]["id"], unique[i]["id"], round(similarity, 3))
        for i, j, similarity in find_near_duplicates([row["context"] for row in unique], threshold)
        if unique[i]["split"] != unique[j]["split"]
    ]

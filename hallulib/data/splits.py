"""Splits that never cut through a group (a document or a patient)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import sha256

from hallulib.data.schema import SPLITS
from hallulib.errors import DataError


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


def split_rows(
    rows: Iterable[dict[str, str]], sizes: Mapping[str, int], seed: int
) -> dict[str, list[dict[str, str]]]:
    """Assign rows to splits by group, then cut each split to at most its size, whole groups first.

    sizes: rows wanted per split. With fewer rows than asked for, the shares stay in proportion.
    Raises DataError when a split would be empty.
    """
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
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


def find_leaks(splits: Mapping[str, Iterable[dict[str, str]]], column: str) -> list[str]:
    """Values of a column (group_id, context) that stand in more than one split."""
    where = Counter(value for rows in splits.values() for value in {row[column] for row in rows})
    return sorted(value for value, count in where.items() if count > 1)

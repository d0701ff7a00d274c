"""Agreement of raters beyond chance: kappa, Krippendorff's alpha, and what holds at extremes.

Every coefficient is None, never NaN or 1, where no grade varies: 0/0 says nothing. Imports only
statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
from sklearn.metrics import cohen_kappa_score

from hallulib.evaluation.statistics import Interval

Grades = Sequence[Hashable]
Level = Literal["nominal", "ordinal", "interval"]


def cohen_kappa(
    first: Grades, second: Grades, weights: Literal["linear", "quadratic"] | None = None
) -> float | None:
    """Cohen's kappa of two raters on the same items (Cohen 1960; scikit-learn).

    weights: for ordered grades given as whole numbers; every number between the lowest and the
    highest counts as a step, given or not. Raises ValueError for unequal or empty lists.
    """
    _check_aligned(first, second)
    used = {*first, *second}
    if len(used) == 1:
        return None
    names = list(range(min(used), max(used) + 1)) if weights else list(used)
    code = {name: place for place, name in enumerate(names)}
    coded = [[code[grade] for grade in side] for side in (first, second)]
    return float(cohen_kappa_score(*coded, labels=range(len(names)), weights=weights))


def prevalence_adjusted_kappa(first: Grades, second: Grades) -> float:
    """PABAK = 2 * agreement - 1 (Byrt et al. 1993): kappa as if both grades were equally common."""
    _check_aligned(first, second)
    return 2 * float(np.mean([a == b for a, b in zip(first, second, strict=True)])) - 1


def gwet_ac1(first: Grades, second: Grades) -> float | None:
    """Gwet's AC1 (2008): stays sensible where one grade is rare and kappa falls to nothing."""
    _check_aligned(first, second)
    counts = Counter([*first, *second])
    if len(counts) == 1:
        return None
    shares = np.array(list(counts.values())) / (2 * len(first))
    chance = float((shares * (1 - shares)).sum()) / (len(counts) - 1)
    observed = float(np.mean([a == b for a, b in zip(first, second, strict=True)]))
    return (observed - chance) / (1 - chance)


def krippendorff_alpha(
    raters: Sequence[Sequence[float | str | None]], level: Level = "nominal"
) -> float | None:
    """Krippendorff's alpha of two or more raters, with None where one did not grade an item.

    raters: one row per rater, one place per item. Ordinal and interval grades are numbers. An item
    with one grade says nothing and is left out. Raises ValueError for rows of unequal length.
    """
    if len({len(row) for row in raters}) != 1:
        raise ValueError(f"raters graded different numbers of items: {[len(r) for r in raters]}")
    items = [[g for g in item if g is not None] for item in zip(*raters, strict=True)]
    items = [item for item in items if len(item) > 1]
    values = sorted({grade for item in items for grade in item})
    if len(values) < 2:
        return None
    place = {value: number for number, value in enumerate(values)}
    together = np.zeros((len(values), len(values)))  # coincidences of values within items
    for item in items:
        counts = np.bincount([place[grade] for grade in item], minlength=len(values))
        together += (np.outer(counts, counts) - np.diag(counts)) / (len(item) - 1)
    totals = together.sum(axis=0)
    distance = _squared_distances(values, totals, level)
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    return float(1 - (together * distance).sum() / (expected * distance).sum())


def _squared_distances(values: list, totals: np.ndarray, level: Level) -> np.ndarray:
    """How far apart two grades are: apart or not, by the grades between them, or as numbers."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        numbers = np.array(values, float)
        return (numbers[:, None] - numbers) ** 2
    ranks = np.cumsum(totals) - totals / 2
    return (ranks[:, None] - ranks) ** 2


def bootstrap_agreement(
    measure: Callable[..., float | None], *raters: Grades, level: float = 0.95,
    resamples: int = 1000, seed: int = 0,
) -> Interval | None:
    """Percentile interval of `measure(*raters)`, resampling items; None where it is undefined in
    more than one of twenty resamples (too little variation to say how sure it is)."""
    size, rng = len(raters[0]), np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        picked = rng.integers(0, size, size)
        found.append(measure(*([side[i] for i in picked] for side in raters)))
    defined = [value for value in found if value is not None]
    if len(defined) < 0.95 * resamples:
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "item bootstrap")


def _check_aligned(first: Grades, second: Grades) -> None:
    if len(first) != len(second) or not first:
        raise ValueError(f"need two equally long, non-empty lists: {len(first)}, {len(second)}")

"""Rates, comparisons, agreement and power: every number with its interval. Imports nothing of ours.

statsmodels, scipy and krippendorff do the sums; by hand stands what they lack (Bonett-Price's
interval, mid-p, exact power by enumeration, PPI++) or do a hundred times slower (kappa).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, sqrt

import krippendorff
import numpy as np
from scipy.stats import binom, fisher_exact, norm
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

Z = float(norm.ppf(0.975))  # every interval of this course is a 95 % interval
FEWEST_GRADED, FEWEST_OF_EACH = 40, 5  # below these the normal interval of PPI++ is too narrow


@dataclass(frozen=True)
class Rate:
    """A number with its interval and unit. `k` of `n` is None for a value that is no count (an
    overlap, kappa); the bounds are None where too little varies to give any."""

    value: float
    low: float | None
    high: float | None
    unit: str
    method: str
    k: int | None = None
    n: int | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        """'6 of 10 summaries (60 %, 31-83 %)', without counts '60 % (31-83 %)', and of what is no
        share (kappa) '0.37 (0.10 to 0.60)'."""
        if self.low is None or self.high is None:
            return f"{self.value:.2f} (too little varies for an interval)"
        if self.method in ("kappa", "alpha"):
            return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"
        value, span = percent(self.value), f"{percent(self.low)}-{percent(self.high)} %"
        if self.k is None:
            return f"{value} % ({span})"
        return f"{self.k} of {self.n} {self.unit} ({value} %, {span})"


def percent(share: float) -> str:
    """A share as percent: whole from 10 on, one decimal below."""
    return f"{100 * share:.0f}" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}"


def format_p(p: float) -> str:
    """A p value as one writes it: three decimals, and 'p < 0.001' below."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def rate(k: int, n: int, unit: str) -> Rate | None:
    """k of n with Wilson's interval (good from n = 10 on, also at 0 and n); None of nothing.

    Raises ValueError for a k outside 0..n: such counts overlap, and are no rate.
    """
    if not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n, got {k} of {n} {unit}")
    if not n:
        return None
    low, high = proportion_confint(k, n, method="wilson")
    return Rate(float(k / n), float(low), float(high), unit, "Wilson", int(k), int(n))


def ratio(tops: Sequence[int], bottoms: Sequence[int], unit: str, seed: int = 0) -> Rate | None:
    """sum(tops) / sum(bottoms), resampling whole documents: statements of one are not independent.

    Where none (or all) of them shows the event, every resample looks the same; then the interval
    of the share of documents bounds the rate. Raises ValueError where a top exceeds its bottom.
    """
    top, bottom = np.asarray(tops), np.asarray(bottoms)
    k, n, documents = int(top.sum()), int(bottom.sum()), int((bottom > 0).sum())
    if (top > bottom).any():
        raise ValueError(f"more {unit} were counted than there are")
    if not n:
        return None
    if k in (0, n):
        bound = rate(documents if k else 0, documents, unit)
        return Rate(k / n, bound.low, bound.high, unit, "Wilson over documents", k, n)
    bounds = resample_ratio(top, bottom, seed)
    return Rate(k / n, *bounds, unit, "bootstrap over documents", k, n)


def resample_ratio(tops: Sequence, bottoms: Sequence, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of sum(tops) / sum(bottoms), drawing documents with replacement."""
    return resample(lambda top, bottom: top.sum() / max(bottom.sum(), 1), tops, bottoms, seed=seed)


def resample(
    measure: Callable[..., float], *columns: Sequence, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of `measure(*columns)`, drawing rows with replacement; NaN bounds where
    too little varies: more than one resample in twenty is undefined."""
    rng, columns = np.random.default_rng(seed), [np.asarray(column) for column in columns]
    draws = rng.integers(0, len(columns[0]), (1000, len(columns[0])))
    found = np.array([measure(*(column[rows] for column in columns)) for rows in draws], float)
    if np.isnan(found).mean() > 0.05:
        return float("nan"), float("nan")
    return tuple(np.nanquantile(found, [0.025, 0.975]).tolist())


def compare_paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """Two systems on the same items: {n, b: wrong only before, c: wrong only after, difference:
    (b - c) / n, low, high, p, p_mid}.

    The interval is Bonett & Price's (2012); p is exact McNemar, p_mid its mid-p (Fagerland et al.
    2013). Raises ValueError for lists of unequal length, or empty ones.
    """
    pairs = list(zip(map(bool, before), map(bool, after), strict=True))
    if not pairs:
        raise ValueError("there are no items to compare")
    n, b, c = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    p_b, p_c = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = Z * sqrt((p_b + p_c - (p_b - p_c) ** 2) / (n + 2))
    p, p_mid = map(float, _test_mcnemar(b, b + c))
    return {
        "n": n, "b": b, "c": c, "difference": (b - c) / n,
        "low": max(-1.0, p_b - p_c - half), "high": min(1.0, p_b - p_c + half),
        "p": p, "p_mid": p_mid,
    }  # fmt: skip


def _test_mcnemar(b: int | np.ndarray, changed: int) -> tuple[np.ndarray, np.ndarray]:
    """The exact p and the mid-p where b of the `changed` items changed to the better."""
    least = np.minimum(b, changed - b)
    p = np.minimum(1.0, 2 * binom.cdf(least, changed, 0.5))
    return p, p - binom.pmf(least, changed, 0.5) * (2 * least != changed)


def compare_unpaired(k1: int, n1: int, k2: int, n2: int) -> dict[str, float]:
    """Rates on different items: {difference, low, high, p}, positive when the second is better,
    with Newcombe's interval (1998) and Fisher's exact p. On the same items `compare_paired` sees
    more."""
    low, high = confint_proportions_2indep(k1, n1, k2, n2, method="newcomb", compare="diff")
    p = float(fisher_exact([[k1, n1 - k1], [k2, n2 - k2]]).pvalue)
    return {"difference": k1 / n1 - k2 / n2, "low": float(low), "high": float(high), "p": p}


def kappa(first: Sequence, second: Sequence) -> Rate | None:
    """Cohen's kappa (1960) of two raters on the same items; None where no grade varies (0/0).
    Raises ValueError for lists of unequal length."""
    pairs = list(zip(first, second, strict=True))
    names = {grade: place for place, grade in enumerate({*first, *second})}
    if len(names) < 2:
        return None
    coded = np.array([[names[a], names[b]] for a, b in pairs]).T
    bounds = resample(_measure_kappa, *coded)
    bounds = (None, None) if np.isnan(bounds[0]) else bounds
    return Rate(_measure_kappa(*coded), *bounds, "items", "kappa", n=len(pairs))


def _measure_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Agreement beyond chance of two lists of whole numbers; NaN where chance alone agrees."""
    size = int(max(first.max(), second.max())) + 1
    shares = [np.bincount(side, minlength=size) / len(side) for side in (first, second)]
    chance, observed = float(shares[0] @ shares[1]), float((first == second).mean())
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def alpha(raters: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's nominal alpha of two or more raters, one row each, NaN where one did not grade
    an item; None where no grade of the items that two of them graded varies."""
    grades = np.array(raters, float)
    shared = grades[:, (~np.isnan(grades)).sum(axis=0) > 1]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return float(krippendorff.alpha(grades, level_of_measurement="nominal"))


def correct_by_people(
    graded: Sequence[bool], verdicts: Sequence[bool], others: Sequence[bool], unit: str
) -> Rate | None:
    """A detector's rate corrected by people's grades (PPI++); with too few, people's own rate.

    graded, verdicts: of the same items, drawn at random before anybody saw a verdict; others:
    verdicts on items nobody graded. Each system needs grades of its own: after training a detector
    errs otherwise than before.
    """
    bad = sum(map(bool, graded))
    enough = len(graded) >= FEWEST_GRADED and min(bad, len(graded) - bad) >= FEWEST_OF_EACH
    if not enough or len(others) < 2:
        return rate(bad, len(graded), unit)
    found = np.clip(correct_mean(graded, verdicts, others), 0, 1).tolist()
    return Rate(*found, unit, "PPI++", n=len(graded))


def correct_mean(
    graded: Sequence[float], verdicts: Sequence[float], others: Sequence[float]
) -> tuple[float, float, float]:
    """(value, low, high): the mean of people's grades, sharpened by a detector's verdicts (PPI++,
    Angelopoulos et al. 2023, the detector's weight tuned). For before and after give differences
    of the same items."""
    y, f, rest = (np.asarray(part, float) for part in (graded, verdicts, others))
    spread = np.concatenate([f, rest]).var(ddof=1)
    raw = np.cov(y, f)[0, 1] / ((1 + len(y) / len(rest)) * spread) if spread else 0.0
    weight = float(np.clip(raw, 0, 1))
    value = float(weight * rest.mean() + (y - weight * f).mean())
    variance = weight**2 * rest.var(ddof=1) / len(rest) + (y - weight * f).var(ddof=1) / len(y)
    half = Z * sqrt(variance)
    return value, value - half, value + half


def paired_power(
    n: int, before: float, after: float, broken: float = 0.05, mid_p: bool = False
) -> float:
    """Chance that McNemar gives p < 0.05 on n items, summed over every possible table.

    broken: share of all items that are good before and bad after. Raises ValueError for rates that
    cannot be.
    """
    fixed = before - after + broken
    if not 0 <= broken <= after or not 0 <= fixed <= before:
        raise ValueError(f"impossible rates: {before} -> {after} with {broken} newly wrong")
    total = 0.0
    for changed in range(1, n + 1):
        b = np.arange(changed + 1)
        seen = _test_mcnemar(b, changed)[mid_p] < 0.05
        share = binom.pmf(b, changed, fixed / (fixed + broken))[seen].sum()
        total += binom.pmf(changed, n, fixed + broken) * share
    return float(total)


def detectable_after(n: int, before: float) -> float | None:
    """The highest rate after, in whole percent, that n paired items show four times in five
    (McNemar's mid-p); None where not even the largest fall would be seen."""
    rates = [share / 100 for share in range(round(100 * before) - 1, 4, -1)]
    return next((x for x in rates if paired_power(n, before, x, mid_p=True) >= 0.8), None)


def items_for_interval(share: float, half: float) -> int:
    """Items until Wilson's interval of one rate reaches at most `half` to either side."""
    n = ceil(share * (1 - share) * (Z / half) ** 2)  # a little more than Wilson asks for
    while n > 1 and np.ptp(proportion_confint(share * (n - 1), n - 1, method="wilson")) <= 2 * half:
        n -= 1
    return n

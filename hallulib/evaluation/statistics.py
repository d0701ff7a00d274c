"""Statistics for rates and for paired before / after comparisons. Imports nothing of ours.

Every function says which paper or library it follows; the golden values that the tests
hold were computed independently (scipy, statsmodels, exact enumeration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from scipy.stats import binom, binomtest, chi2, fisher_exact, norm


@dataclass(frozen=True)
class Interval:
    """A two-sided interval [low, high] and how it was made."""

    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True)
class Proportion:
    """k of n with its interval. A rate never travels without its denominator and unit."""

    k: int
    n: int
    value: float
    low: float
    high: float
    level: float
    method: str
    unit: str

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class PairedResult:
    """Two systems on the same n items; "bad" means the item shows the error.

    b: bad under the first, good under the second (fixed); c: good, then bad (newly broken).
    difference = (b - c) / n, positive when the second system is better.
    """

    n: int
    both_bad: int
    b: int
    c: int
    both_good: int
    difference: float
    low: float
    high: float
    level: float
    p_exact: float
    p_mid: float

    def to_dict(self) -> dict:
        return asdict(self)


def _check_counts(k: int, n: int) -> None:
    if n <= 0 or not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n and n > 0, got k={k}, n={n}")


def wilson_interval(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of k of n (Wilson 1927; scipy). Good from n = 10 on, also at 0 and n.

    Raises ValueError when n is 0 or k is outside 0..n.
    """
    _check_counts(k, n)
    ci = binomtest(int(k), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return Interval(float(ci.low), float(ci.high), level, "Wilson")


def clopper_pearson_interval(k: int, n: int, level: float = 0.95) -> Interval:
    """Exact (conservative) interval of k of n (Clopper & Pearson 1934; scipy)."""
    _check_counts(k, n)
    ci = binomtest(int(k), int(n)).proportion_ci(confidence_level=level, method="exact")
    return Interval(float(ci.low), float(ci.high), level, "Clopper-Pearson")


def estimate_proportion(k: int, n: int, unit: str, level: float = 0.95) -> Proportion:
    """k of n with its Wilson interval and the unit it counts ("summary", "statement", ...)."""
    interval = wilson_interval(k, n, level)
    return Proportion(
        int(k), int(n), k / n, interval.low, interval.high, level, interval.method, unit
    )


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p (binomial test of b against c at 1/2); 1.0 with no discordant pair.

    With fewer than 6 discordant pairs it can never be below 0.05.
    """
    if b < 0 or c < 0:
        raise ValueError(f"discordant counts cannot be negative: b={b}, c={c}")
    if b + c == 0:
        return 1.0
    return float(binomtest(min(b, c), b + c, 0.5).pvalue)


def mcnemar_mid_p(b: int, c: int) -> float:
    """Two-sided mid-p McNemar: the exact p less P(X = min(b, c)) (Fagerland et al. 2013)."""
    if b + c == 0:
        return 1.0
    point = float(binom.pmf(min(b, c), b + c, 0.5))
    if b == c:  # both tails share the central point: 2 * P(X <= b) - P(X = b) is exactly 1
        return 1.0
    return mcnemar_exact(b, c) - point


def bonett_price_interval(b: int, c: int, n: int, level: float = 0.95) -> Interval:
    """Interval of the paired difference (b - c) / n (Bonett & Price 2012).

    One is added to b and c and two to n, which keeps the coverage near nominal at n = 10
    where the Wald interval has 84-92 %.
    """
    if n <= 0 or b < 0 or c < 0 or b + c > n:
        raise ValueError(f"need b, c >= 0 and b + c <= n, n > 0; got b={b}, c={c}, n={n}")
    b_share, c_share = (b + 1) / (n + 2), (c + 1) / (n + 2)
    difference = b_share - c_share
    half = norm.ppf((1 + level) / 2) * sqrt((b_share + c_share - difference**2) / (n + 2))
    return Interval(
        max(-1.0, float(difference - half)), min(1.0, float(difference + half)), level,
        "Bonett-Price",
    )


def cochran_q(outcomes: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Return Q and its p: do systems, one row of `outcomes` each over the same items, differ at
    all? (Cochran 1950; chi-square with one degree of freedom less than systems.)

    Asked first where there are more than two. Raises ValueError for fewer than two systems, or
    rows of different lengths.
    """
    table = np.array([list(row) for row in outcomes], dtype=float)
    if table.ndim != 2 or len(table) < 2 or not table.size:
        raise ValueError("need at least two systems on the same items")
    systems, by_system, by_item = len(table), table.sum(1), table.sum(0)
    spread = (by_item * (systems - by_item)).sum()
    if not spread:
        return 0.0, 1.0  # every item is the same under all systems
    q = systems * (systems - 1) * ((by_system - by_system.mean()) ** 2).sum() / spread
    return float(q), float(chi2.sf(q, systems - 1))


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values as they count when all of them were looked at (Holm 1979)."""
    order = np.argsort(p_values)
    weights = np.arange(len(p_values), 0, -1)
    raised = np.minimum(1.0, np.maximum.accumulate(weights * np.asarray(p_values)[order]))
    adjusted = np.empty(len(p_values))
    adjusted[order] = raised
    return adjusted.tolist()


def compare_paired(before: Sequence[bool], after: Sequence[bool], level=0.95) -> PairedResult:
    """Two aligned lists of "this item is bad", same items in the same order -> the paired result.

    Raises ValueError when the lists differ in length or are empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"need two equally long, non-empty lists: {len(before)}, {len(after)}")
    pairs = [(bool(x), bool(y)) for x, y in zip(before, after, strict=True)]
    n, b, c = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    interval = bonett_price_interval(b, c, n, level)
    return PairedResult(
        n=n, both_bad=pairs.count((True, True)), b=b, c=c, both_good=pairs.count((False, False)),
        difference=(b - c) / n, low=interval.low, high=interval.high, level=level,
        p_exact=mcnemar_exact(b, c), p_mid=mcnemar_mid_p(b, c),
    )


@dataclass(frozen=True)
class UnpairedResult:
    """k of n under each of two systems on *different* items. difference = rate1 - rate2, positive
    when the second is better; the interval is Newcombe's, p is Fisher's exact."""

    difference: float
    low: float
    high: float
    level: float
    p_fisher: float

    def to_dict(self) -> dict:
        return asdict(self)


def compare_unpaired(k1: int, n1: int, k2: int, n2: int, level: float = 0.95) -> UnpairedResult:
    """Two rates on different items: Newcombe's interval (1998) and Fisher's exact p (scipy).

    For the same items under both systems use `compare_paired`: it sees more and asks for less.
    """
    first, second = wilson_interval(k1, n1, level), wilson_interval(k2, n2, level)
    p1, p2 = k1 / n1, k2 / n2
    low = p1 - p2 - sqrt((p1 - first.low) ** 2 + (second.high - p2) ** 2)
    high = p1 - p2 + sqrt((first.high - p1) ** 2 + (p2 - second.low) ** 2)
    p = float(fisher_exact([[k1, n1 - k1], [k2, n2 - k2]]).pvalue)
    return UnpairedResult(p1 - p2, low, high, level, p)


def cluster_bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, level: float = 0.95,
    resamples: int = 2000, seed: int = 0,
) -> Interval:
    """Percentile interval of sum(numerators) / sum(denominators), resampling whole items.

    Statements inside one summary are not independent, so items are resampled, not statements.
    One entry per item; items with denominator 0 are allowed. Raises ValueError if all are 0.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if len(top) != len(bottom) or bottom.sum() <= 0:
        raise ValueError("need equally long lists and at least one non-zero denominator")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(top), np.full(len(top), 1 / len(top)), size=resamples)
    below = weights @ bottom
    ratios = (weights @ top)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "cluster bootstrap")

"""Rates, comparisons, agreement and power: every number with its interval. Imports nothing of ours.

statsmodels, scipy and krippendorff do the sums; by hand stands only what they lack: Bonett-Price's
interval, exact power by enumeration, and PPI++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, sqrt

import krippendorff
import numpy as np
from scipy.stats import binom, norm
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import cochrans_q, mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

Z = float(norm.ppf(0.975))  # every interval of this course is a 95 % interval


@dataclass(frozen=True)
class Rate:
    """A share with its interval, and what was counted: it never travels without them.

    `k` and `n` are None for a value that is no count (kappa, an overlap, a corrected rate).
    """

    value: float
    low: float
    high: float
    unit: str
    method: str
    k: int | None = None
    n: int | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        """'6 of 10 summaries (60 %, 31-83 %)'; without counts '60 % (31-83 %)'."""
        span = f"{percent(self.value)} %, {percent(self.low)}-{percent(self.high)} %"
        return f"{self.k} of {self.n} {self.unit} ({span})" if self.k is not None else span


def percent(share: float) -> str:
    """A share as percent: whole from 10 on, one decimal below."""
    return f"{100 * share:.0f}" if share >= 0.0995 or share == 0 else f"{100 * share:.1f}"


def rate(k: int, n: int, unit: str) -> Rate | None:
    """k of n with Wilson's interval (good from n = 10 on, also at 0 and n); None of nothing."""
    if not n:
        return None
    low, high = proportion_confint(k, n, method="wilson")
    return Rate(k / n, float(low), float(high), unit, "Wilson", int(k), int(n))


def ratio(tops: Sequence[float], bottoms: Sequence[float], unit: str, seed: int = 0) -> Rate | None:
    """sum(tops) / sum(bottoms), resampling whole documents: statements of one are not independent.

    Where none (or all) of them shows the event, every resample looks the same; then the interval
    of the share of documents bounds the rate.
    """
    top, bottom = np.asarray(tops, float), np.asarray(bottoms, float)
    if not bottom.sum():
        return None
    value, method = float(top.sum() / bottom.sum()), "bootstrap over documents"
    if 0 < value < 1:
        low, high = resample(lambda a, b: a.sum() / max(b.sum(), 1), top, bottom, seed=seed)
    else:
        bound = rate(int((top > 0).sum()), int((bottom > 0).sum()), unit)
        low, high, method = bound.low, bound.high, "Wilson over documents"
    return Rate(value, low, high, unit, method, int(top.sum()), int(bottom.sum()))


def resample(
    measure: Callable[..., float], *columns: Sequence, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of `measure(*columns)`, drawing rows with replacement.

    NaN bounds where too little varies: more than one resample in twenty is undefined.
    """
    rng, columns = np.random.default_rng(seed), [np.asarray(column) for column in columns]
    draws = rng.integers(0, len(columns[0]), (1000, len(columns[0])))
    found = np.array([measure(*(column[rows] for column in columns)) for rows in draws], float)
    if np.isnan(found).mean() > 0.05:
        return float("nan"), float("nan")
    return tuple(np.nanquantile(found, [0.025, 0.975]).tolist())


def compare_paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """Two systems on the same items: {n, b, c, difference, low, high, p}.

    b: wrong only before (fixed); c: wrong only after (broken). difference = (b - c) / n, positive
    when `after` is better, with Bonett & Price's interval (2012); p is exact McNemar.
    """
    pairs = list(zip(map(bool, before), map(bool, after), strict=True))
    n, b, c = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    p_b, p_c = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = Z * sqrt((p_b + p_c - (p_b - p_c) ** 2) / (n + 2))
    return {
        "n": n, "b": b, "c": c, "difference": (b - c) / n,
        "low": max(-1.0, p_b - p_c - half), "high": min(1.0, p_b - p_c + half),
        "p": float(mcnemar([[0, b], [c, 0]], exact=True).pvalue) if b + c else 1.0,
    }  # fmt: skip


def compare_unpaired(k1: int, n1: int, k2: int, n2: int) -> tuple[float, float, float]:
    """(difference, low, high) of rates on different items: Newcombe's interval (1998)."""
    low, high = confint_proportions_2indep(k1, n1, k2, n2, method="newcomb", compare="diff")
    return k1 / n1 - k2 / n2, float(low), float(high)


def compare_all(outcomes: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Cochran's Q and its p: do systems (rows) differ at all on the same items (columns)?"""
    table = np.array(outcomes, dtype=int)
    if (table == table[0]).all():
        return 0.0, 1.0  # every item is the same under all systems
    found = cochrans_q(table.T)
    return float(found.statistic), float(found.pvalue)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """The p values as they count when all of them were looked at (Holm 1979)."""
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


def kappa(first: Sequence, second: Sequence) -> Rate | None:
    """Cohen's kappa of two raters on the same items; None where no grade varies (0/0)."""
    if len({*first, *second}) < 2:
        return None
    low, high = resample(cohen_kappa_score, list(first), list(second))
    return Rate(float(cohen_kappa_score(first, second)), low, high, "items", "kappa", n=len(first))


def alpha(raters: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's nominal alpha; NaN where a rater did not grade; None where nothing varies."""
    if len({v for row in raters for v in row if v == v}) < 2:
        return None
    return float(krippendorff.alpha(np.array(raters), level_of_measurement="nominal"))


FEWEST_GRADED, FEWEST_OF_EACH = 40, 5  # below these the normal interval of PPI++ is too narrow


def correct_by_people(
    graded: Sequence[bool], verdicts: Sequence[bool], others: Sequence[bool], unit: str
) -> Rate | None:
    """A detector's rate corrected by people's grades (PPI++, Angelopoulos et al. 2023).

    graded, verdicts: both of the same items, a random sample drawn before anybody saw a verdict;
    others: verdicts on items nobody graded. With too few grades, people's own rate.
    """
    y, f, rest = (np.asarray(part, float) for part in (graded, verdicts, others))
    enough = len(y) >= FEWEST_GRADED and min(y.sum(), len(y) - y.sum()) >= FEWEST_OF_EACH
    if not enough or len(rest) < 2:
        return rate(int(y.sum()), len(y), unit)
    spread = np.concatenate([f, rest]).var(ddof=1)
    raw = np.cov(y, f)[0, 1] / ((1 + len(y) / len(rest)) * spread) if spread else 0.0
    weight = float(np.clip(raw, 0, 1))
    value = weight * rest.mean() + (y - weight * f).mean()
    variance = weight**2 * rest.var(ddof=1) / len(rest) + (y - weight * f).var(ddof=1) / len(y)
    low, high = np.clip([value - Z * sqrt(variance), value + Z * sqrt(variance)], 0, 1)
    return Rate(float(value), float(low), float(high), unit, "PPI++", n=len(y))


def paired_power(n: int, before: float, after: float, broken: float = 0.05) -> float:
    """Chance that exact McNemar gives p < 0.05 on n items, summed over every possible table.

    broken: share of all items that are good before and bad after.
    """
    fixed, total = before - after + broken, 0.0
    for changed in range(1, n + 1):
        b = np.arange(changed + 1)
        p = np.minimum(1.0, 2 * binom.cdf(np.minimum(b, changed - b), changed, 0.5))
        seen = binom.pmf(b, changed, fixed / (fixed + broken))[p < 0.05].sum()
        total += binom.pmf(changed, n, fixed + broken) * seen
    return float(total)


def detectable_after(n: int, before: float, power: float = 0.8) -> float | None:
    """The highest rate after, in whole percent, that n paired items would show; None if none."""
    rates = [percent / 100 for percent in range(round(100 * before) - 1, 4, -1)]
    return next((after for after in rates if paired_power(n, before, after) >= power), None)


def items_for_interval(share: float, half: float) -> int:
    """Items until Wilson's interval of one rate reaches at most `half` to either side."""
    n = ceil(share * (1 - share) * (Z / half) ** 2)  # a little more than Wilson asks for
    while n > 1 and np.ptp(proportion_confint(share * (n - 1), n - 1, method="wilson")) <= 2 * half:
        n -= 1
    return n

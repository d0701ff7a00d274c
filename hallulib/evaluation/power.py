"""How many items to grade: sample sizes, and exact power by enumeration. Rates are in 0..1.

Paired: the same n items under both systems. Unpaired: n different items per arm.
"""

from __future__ import annotations

from collections.abc import Callable
from math import asin, ceil, sqrt
from typing import Literal

import numpy as np
from scipy.stats import binom, hypergeom, norm

from hallulib.evaluation.statistics import mcnemar_exact


def cohen_h(first: float, second: float) -> float:
    """Cohen's effect size h of two rates, positive when the first is larger (Cohen 1988)."""
    return 2 * asin(sqrt(first)) - 2 * asin(sqrt(second))


def items_for_interval(rate: float, half_width: float, level: float = 0.95) -> int:
    """Items until the Wilson interval of one rate reaches at most `half_width` to either side of
    its middle (both as shares): 89 for 60 % to within 10 points."""
    if not 0 < half_width < 1 or not 0 <= rate <= 1:
        raise ValueError(f"need shares, got a rate of {rate} and a half-width of {half_width}")
    z = float(norm.ppf((1 + level) / 2))
    n = 1
    while z * sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n) > half_width:
        n += 1
    return n


def unpaired_sample_size(before: float, after: float, power=0.8, level=0.95) -> int:
    """Items *per arm* to see `before` against `after` on different items (pooled z formula).

    Fisher's exact test needs about a sixth more. Raises ValueError when the rates are equal.
    """
    _check_effect(before, after)
    mean = (before + after) / 2
    z_alpha, z_beta = norm.ppf((1 + level) / 2), norm.ppf(power)
    spread = sqrt(before * (1 - before) + after * (1 - after))
    root = z_alpha * sqrt(2 * mean * (1 - mean)) + z_beta * spread
    return ceil(root**2 / (before - after) ** 2)


def paired_sample_size(
    before: float, after: float, new_error_rate: float = 0.05, power=0.8, level=0.95
) -> int:
    """Items needed to see a drop from `before` to `after` on the same items (Connor 1987).

    new_error_rate: share of all items that are good before and bad after.
    The formula is a little below exact McNemar's own need (32.4 against 36 for 60 -> 30 %).
    """
    _check_effect(before, after)
    effect = before - after
    discordant = abs(effect) + 2 * new_error_rate
    z_alpha, z_beta = norm.ppf((1 + level) / 2), norm.ppf(power)
    root = z_alpha * sqrt(discordant) + z_beta * sqrt(discordant - effect**2)
    return ceil(root**2 / effect**2)


def _check_effect(before: float, after: float) -> None:
    if before == after:
        raise ValueError("no difference to detect: `before` equals `after`")


def paired_power(
    n: int, before: float, after: float, new_error_rate: float = 0.05,
    test: Literal["exact", "mid_p"] = "exact", alpha: float = 0.05,
) -> float:
    """Chance that McNemar gives p < alpha on n items, summed over every possible table.

    Raises ValueError when the rates cannot be (new_error_rate above `after`, or fixes below 0).
    """
    fixed = before - after + new_error_rate
    if not 0 <= new_error_rate <= after or fixed < 0 or fixed > before:
        raise ValueError(f"impossible rates: {before} -> {after} with {new_error_rate} new errors")
    discordant, total = fixed + new_error_rate, 0.0
    for changed in range(1, n + 1):
        b = np.arange(changed + 1)
        least = np.minimum(b, changed - b)
        p = np.minimum(1.0, 2 * binom.cdf(least, changed, 0.5))
        if test == "mid_p":
            p = p - binom.pmf(least, changed, 0.5) * (2 * least != changed)
        chance = binom.pmf(b, changed, fixed / discordant)[p < alpha].sum()
        total += binom.pmf(changed, n, discordant) * chance
    return float(total)


def unpaired_power(n: int, before: float, after: float, alpha: float = 0.05) -> float:
    """Chance that Fisher's exact test (two-sided) gives p < alpha with n items per arm."""
    k = np.arange(n + 1)
    chance = np.outer(binom.pmf(k, n, before), binom.pmf(k, n, after))
    total = 0.0
    for hits in range(2 * n + 1):  # with the sum of both arms given, the table has one free cell
        first = np.arange(max(0, hits - n), min(n, hits) + 1)
        weights = hypergeom.pmf(first, 2 * n, hits, n)
        p = np.array([weights[weights <= w * (1 + 1e-7)].sum() for w in weights])
        total += chance[first, hits - first][p < alpha].sum()
    return float(total)


def smallest_n(power_of: Callable[[int], float], power: float = 0.8, longest: int = 400) -> int:
    """The n from which `power_of(n)` stays at `power` or above (exact power goes in saw teeth).

    Raises ValueError when it is not reached by `longest`.
    """
    below = [n for n in range(2, longest + 1) if power_of(n) < power]
    if below and below[-1] == longest:
        raise ValueError(f"a power of {power} is not reached by n = {longest}")
    return below[-1] + 1 if below else 2


def detectable_after(
    n: int, before: float, new_error_rate: float = 0.05, power: float = 0.8
) -> float | None:
    """The highest rate after, in whole percent, that n paired items would show (McNemar mid-p);
    None where not even the largest fall would be seen."""
    highest, lowest = round(100 * before) - 1, ceil(100 * new_error_rate)
    for percent in range(highest, lowest - 1, -1):
        if paired_power(n, before, percent / 100, new_error_rate, "mid_p") >= power:
            return percent / 100
    return None


def fewest_fixed_to_show(new_errors: int = 0, alpha: float = 0.05) -> int:
    """Smallest b for which exact McNemar p < alpha when c = new_errors (6 when c is 0)."""
    b = new_errors
    while mcnemar_exact(b, new_errors) >= alpha:
        b += 1
    return b

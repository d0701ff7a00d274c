"""A detector's many verdicts corrected by people's few: Rogan-Gladen and PPI++.

The graded items must be a random sample drawn before anybody saw a verdict, and each system needs
grades of its own: after training, a detector errs otherwise than before. Imports only statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from scipy.stats import norm

from hallulib.evaluation.statistics import wilson_interval

FEWEST_GRADED, FEWEST_OF_EACH = 40, 5  # below these the normal interval of PPI++ is too narrow
LEAST_QUALITY = 1.3  # sensitivity + specificity from which Rogan-Gladen is stable


@dataclass(frozen=True)
class Estimate:
    """A rate (or a difference) with its interval. `graded` items have people's grades, `scored`
    more have a detector's verdict only. `weight` is how much the detector counts (0 = not)."""

    value: float
    low: float
    high: float
    level: float
    method: str
    graded: int
    scored: int
    weight: float

    def to_dict(self) -> dict:
        return asdict(self)


def rogan_gladen(
    flagged: tuple[int, int], caught: tuple[int, int], passed: tuple[int, int], level: float = 0.95
) -> Estimate:
    """Correct a detector's rate by its own error rates (Rogan & Gladen 1978).

    flagged: (flagged, all) scored items; caught: (flagged, all) of those that people call
    hallucinated (sensitivity); passed: (not flagged, all) of those that people call faithful
    (specificity). The interval counts the uncertainty of all three (Lang & Reiczigel 2014).
    Raises ValueError below sensitivity + specificity = 1.3, where a small error becomes any rate.
    """
    if any(n <= 0 or not 0 <= k <= n for k, n in (flagged, caught, passed)):
        raise ValueError(f"need 0 <= k <= n and n > 0, got {flagged}, {caught}, {passed}")
    rate, sensitivity, specificity = (k / n for k, n in (flagged, caught, passed))
    quality = sensitivity + specificity
    if quality < LEAST_QUALITY:
        raise ValueError(
            f"sensitivity + specificity is {quality:.2f}, below {LEAST_QUALITY}: the correction "
            "would be unstable; report people's own rate"
        )
    value = (rate + specificity - 1) / (quality - 1)
    z = float(norm.ppf((1 + level) / 2))
    n, positives, negatives = flagged[1] + z**2, caught[1] + 2, passed[1] + 2
    p = (flagged[0] + z**2 / 2) / n
    se, sp = (caught[0] + 1) / positives, (passed[0] + 1) / negatives
    centre = (p + sp - 1) / (se + sp - 1)
    var_se, var_sp = se * (1 - se) / positives, sp * (1 - sp) / negatives
    shift = 2 * z**2 * (centre * var_se - (1 - centre) * var_sp)
    variance = p * (1 - p) / n + centre**2 * var_se + (1 - centre) ** 2 * var_sp
    half = z * sqrt(variance) / (se + sp - 1)
    low, high = (_clip(bound) for bound in (centre + shift - half, centre + shift + half))
    graded = caught[1] + passed[1]
    return Estimate(_clip(value), low, high, level, "Rogan-Gladen", graded, flagged[1], 1.0)


def ppi_mean(
    graded: Sequence[float], verdicts: Sequence[float], other_verdicts: Sequence[float],
    level: float = 0.95, weight: float | None = None,
) -> Estimate:
    """Mean of people's grades, sharpened by a detector's (PPI++, Angelopoulos et al. 2023).

    graded, verdicts: grade and verdict of the same items; other_verdicts: of items nobody graded.
    For before / after give *differences* of the same items. weight: None tunes it (0 ignores the
    detector, 1 is plain PPI). Raises ValueError for unequal lists or fewer than two of each.
    """
    y, f, rest = (np.asarray(list(part), float) for part in (graded, verdicts, other_verdicts))
    if len(y) != len(f) or len(y) < 2 or len(rest) < 2:
        raise ValueError(
            f"need two equally long lists and other verdicts, two or more of each: "
            f"{len(y)}, {len(f)}, {len(rest)}"
        )
    if not np.isfinite(np.concatenate([y, f, rest])).all():
        raise ValueError("a grade or verdict is not a number; leave items without one out")
    n, more = len(y), len(rest)
    spread = np.concatenate([f, rest]).var(ddof=1)
    if weight is None:
        raw = np.cov(y, f)[0, 1] / ((1 + n / more) * spread) if spread else 0.0
        weight = float(np.clip(raw, 0, 1))
    value = weight * rest.mean() + (y - weight * f).mean()
    variance = weight**2 * rest.var(ddof=1) / more + (y - weight * f).var(ddof=1) / n
    half = float(norm.ppf((1 + level) / 2)) * sqrt(variance)
    bounds = float(value), float(value - half), float(value + half)
    return Estimate(*bounds, level, "PPI++", n, more, weight)


def estimate_true_rate(
    graded: Sequence[bool], verdicts: Sequence[bool], other_verdicts: Sequence[bool],
    level: float = 0.95,
) -> Estimate:
    """The rate by PPI++ where the grades suffice for it, else people's own with Wilson.

    PPI++ asks for 40 graded items with at least 5 of each kind: below, its interval covers less
    than it says.
    """
    bad = sum(map(bool, graded))
    enough = len(graded) >= FEWEST_GRADED and min(bad, len(graded) - bad) >= FEWEST_OF_EACH
    if enough and len(other_verdicts) >= 2:
        found = ppi_mean(graded, verdicts, other_verdicts, level)
        return Estimate(**found.to_dict() | {"low": _clip(found.low), "high": _clip(found.high)})
    wilson = wilson_interval(bad, len(graded), level)
    rate = bad / len(graded)
    return Estimate(
        rate, wilson.low, wilson.high, level, "Wilson, people only", len(graded), 0, 0.0
    )


def _clip(share: float) -> float:
    return float(min(1.0, max(0.0, share)))

"""Agreement between two series of grades: percent, Cohen's kappa, and where kappa says nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

from hallulib.evaluation.statistics import wilson_interval

UNDEFINED = "undefined (no variation)"


@dataclass(frozen=True)
class Agreement:
    """Two raters on the same n items. `kappa` is None when it is undefined; `low` and `high` bound
    the percent agreement (Wilson 95 %) and are None when n is 0."""

    n: int
    agreed: int
    kappa: float | None
    low: float | None
    high: float | None

    @property
    def share(self) -> float | None:
        """Share of items with the same grade, None when there are none."""
        return self.agreed / self.n if self.n else None

    @property
    def kappa_text(self) -> str:
        """Kappa for a reader: two decimals, or why there is none."""
        if self.n == 0:
            return "no items"
        return UNDEFINED if self.kappa is None else f"{self.kappa:.2f}"

    def to_dict(self) -> dict:
        """Plain values, with the text of kappa beside its number."""
        return asdict(self) | {"share": self.share, "kappa_text": self.kappa_text}


def percent_agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Share of places with equal grades. Raises ValueError for unequal or empty lists."""
    _check_aligned(first, second)
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (1960): agreement beyond what the raters' own frequencies give by chance.

    None when both gave one and the same grade throughout: chance agreement is then 1 and kappa is
    0/0, neither 1 nor 0. Raises ValueError for unequal or empty lists.
    """
    observed = percent_agreement(first, second)
    n = len(first)
    expected = sum((first.count(g) / n) * (second.count(g) / n) for g in set(first))
    if expected == 1:
        return None
    return (observed - expected) / (1 - expected)


def compare_grades(first: Sequence[Hashable], second: Sequence[Hashable]) -> Agreement:
    """Percent agreement with its interval and kappa; empty lists give an Agreement of n = 0."""
    if not first and not second:
        return Agreement(0, 0, None, None, None)
    _check_aligned(first, second)
    first, second = list(first), list(second)
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    interval = wilson_interval(agreed, len(first))
    return Agreement(
        len(first), agreed, cohen_kappa(first, second), interval.low, interval.high
    )


def _check_aligned(first: Sequence[Hashable], second: Sequence[Hashable]) -> None:
    if len(first) != len(second) or not first:
        raise ValueError(f"need two equally long, non-empty lists: {len(first)}, {len(second)}")

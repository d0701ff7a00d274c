"""Agreement of grades in words: never a bare percentage, never a kappa where nothing varies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

from hallulib.evaluation.agreement import bootstrap_agreement, cohen_kappa, krippendorff_alpha
from hallulib.evaluation.statistics import wilson_interval

UNDEFINED = "undefined (no variation)"
RESAMPLES = 500  # a kappa takes about a millisecond; more would not move the second decimal


@dataclass(frozen=True)
class Coefficient:
    """Kappa or alpha with its interval (item bootstrap, 95 %). `value` None: no grade varies;
    `low` None: too little varies for an interval."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """For a reader: two decimals and the interval, or why there is none."""
        if self.value is None:
            return UNDEFINED
        if self.low is None:
            return f"{self.value:.2f} (too little variation for an interval)"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Agreement:
    """Two raters on the same n items. `low` and `high` bound the share that agrees (Wilson 95 %);
    everything but n and agreed is None when n is 0."""

    n: int
    agreed: int
    kappa: Coefficient | None
    low: float | None
    high: float | None

    @property
    def share(self) -> float | None:
        """Share of items with the same grade, None when there are none."""
        return self.agreed / self.n if self.n else None

    @property
    def kappa_text(self) -> str:
        """Kappa for a reader."""
        return self.kappa.text if self.kappa else "no items"

    def to_dict(self) -> dict:
        """Plain values, with the text of kappa beside its number."""
        return asdict(self) | {"share": self.share, "kappa_text": self.kappa_text}


def compare_grades(first: Sequence[Hashable], second: Sequence[Hashable]) -> Agreement:
    """Percent agreement and kappa with intervals; empty lists give an Agreement of n = 0.

    Raises ValueError for lists of unequal length.
    """
    if not first and not second:
        return Agreement(0, 0, None, None, None)
    kappa = measure(cohen_kappa, first, second)
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    interval = wilson_interval(agreed, len(first))
    return Agreement(len(first), agreed, kappa, interval.low, interval.high)


def compare_raters(raters: Sequence[Sequence[str | None]]) -> Coefficient:
    """Krippendorff's alpha (nominal) of two or more raters; None where one did not grade."""
    return measure(lambda *rows: krippendorff_alpha(rows), *raters)


def measure(coefficient, *raters: Sequence[Hashable]) -> Coefficient:
    """A coefficient of agreement with its interval."""
    value = coefficient(*raters)
    found = None
    if value is not None:
        found = bootstrap_agreement(coefficient, *raters, resamples=RESAMPLES)
    return Coefficient(value, found and found.low, found and found.high)

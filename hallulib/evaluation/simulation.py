"""What a report would say if the truth were known: a detector whose errors training has changed.

DPO learns what its detector sees. What is left afterwards is what the detector does not see, so
the detector finds a smaller share of it than before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hallulib.evaluation.calibration import ppi_mean, rogan_gladen

METHODS = (
    "detector alone", "corrected by its old error rates", "people alone", "people and detector",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One system: its true rate, and how the detector does on its texts. Shares in 0..1."""

    rate: float
    sensitivity: float
    specificity: float


def simulate_reports(
    before: Arm, after: Arm, *, scored: int = 400, graded: int = 60, studies: int = 500,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Repeat one study many times: the fall of the rate as four methods report it.

    Each study has `scored` items under both systems; people grade `graded` of them, drawn at
    random, under both. Returns method -> {mean, low, high (where 95 % of the studies lie), covered
    (share of the 95 % intervals that hold the truth; None where the method gives none)}.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    covered: list[bool] = []
    for _ in range(studies):
        truths, verdicts = zip(*(_draw(rng, arm, scored) for arm in (before, after)), strict=True)
        fall = truths[0] - truths[1]
        seen = verdicts[0] - verdicts[1]
        found[METHODS[0]].append(seen.mean())
        found[METHODS[1]].append(_correct_both(truths[0], verdicts, graded))
        found[METHODS[2]].append(fall[:graded].mean())
        best = ppi_mean(fall[:graded], seen[:graded], seen[graded:])
        found[METHODS[3]].append(best.value)
        covered.append(best.low <= before.rate - after.rate <= best.high)
    return {
        name: _describe(values, np.mean(covered) if name == METHODS[3] else None)
        for name, values in found.items()
    }


def _draw(rng: np.random.Generator, arm: Arm, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth and verdict (1.0 = hallucinated) of `count` items of one system."""
    wrong = rng.random(count) < arm.rate
    caught = rng.random(count) < np.where(wrong, arm.sensitivity, 1 - arm.specificity)
    return wrong.astype(float), caught.astype(float)


def _correct_both(
    truth: np.ndarray, verdicts: tuple[np.ndarray, ...], graded: int
) -> float:
    """Rogan-Gladen on both arms with error rates measured on the *first* one only; NaN where the
    sample is too unlucky for a correction."""
    wrong, called = truth[:graded] == 1, verdicts[0][:graded] == 1
    caught = int((wrong & called).sum()), int(wrong.sum())
    passed = int((~wrong & ~called).sum()), int((~wrong).sum())
    try:
        rates = [rogan_gladen((int(v.sum()), len(v)), caught, passed).value for v in verdicts]
    except ValueError:
        return float("nan")
    return rates[0] - rates[1]


def _describe(values: list[float], covered: Any) -> dict[str, Any]:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {
        "mean": float(np.nanmean(values)), "low": float(low), "high": float(high),
        "covered": None if covered is None else float(covered),
    }  # fmt: skip

"""A detector corrected by people: golden values, the reference library's figures, and coverage."""

from __future__ import annotations

import numpy as np
import pytest

from hallulib.evaluation.calibration import estimate_true_rate, ppi_mean, rogan_gladen

pytestmark = pytest.mark.unit
GRADES = [float(i % 3 == 0) for i in range(40)]
VERDICTS = [y if i % 6 else 1 - y for i, y in enumerate(GRADES)]
OTHERS = [float((i * 7) % 20 < 8) for i in range(200)]


def test_rogan_gladen_gives_the_worked_example():
    found = rogan_gladen((84, 200), (17, 20), (34, 40))
    assert found.value == pytest.approx(0.385714, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.22, 0.57), abs=5e-3)


def test_rogan_gladen_explains_why_fifteen_percent_looks_like_twenty_five():
    raw = 0.15 * 0.85 + 0.85 * 0.15
    assert raw == pytest.approx(0.255)
    found = rogan_gladen((round(raw * 10_000), 10_000), (850, 1000), (850, 1000))
    assert found.value == pytest.approx(0.15, abs=1e-3)


def test_a_detector_near_guessing_is_refused():
    with pytest.raises(ValueError, match="below 1.3"):
        rogan_gladen((84, 200), (12, 20), (26, 40))
    with pytest.raises(ValueError, match="k <= n"):
        rogan_gladen((84, 200), (0, 0), (26, 40))


@pytest.mark.parametrize(
    ("weight", "value", "low", "high"),
    [(1.0, 0.575, 0.439077, 0.710923), (None, 0.441908, 0.315391, 0.568424),
     (0.0, 0.35, 0.202188, 0.497812)],
)  # fmt: skip
def test_ppi_agrees_with_the_reference_library(weight, value, low, high):
    """ppi_py 0.2.3 on these very numbers; it divides by n where we divide by n - 1."""
    found = ppi_mean(GRADES, VERDICTS, OTHERS, weight=weight)
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high), abs=4e-3)


def test_the_tuned_weight_narrows_the_interval_and_is_zero_for_a_useless_detector():
    tuned, plain = ppi_mean(GRADES, VERDICTS, OTHERS), ppi_mean(GRADES, VERDICTS, OTHERS, weight=0)
    assert tuned.high - tuned.low < plain.high - plain.low
    assert 0 < tuned.weight < 1
    silent = ppi_mean(GRADES, [0.0] * 40, [0.0] * 200)
    assert (silent.weight, silent.value) == (0.0, pytest.approx(0.35))


@pytest.mark.parametrize(
    ("grades", "verdicts", "others", "message"),
    [([1, 0], [1], [0, 1], "equally long"), ([1, 0], [1, 0], [0], "two or more"),
     ([1, np.nan], [1, 0], [0, 1], "not a number")],
)  # fmt: skip
def test_grades_that_do_not_fit_are_refused(grades, verdicts, others, message):
    with pytest.raises(ValueError, match=message):
        ppi_mean(grades, verdicts, others)


def draw(rng, count: int, truth: float, sensitivity: float, specificity: float):
    y = rng.random(count) < truth
    return y, np.where(y, rng.random(count) < sensitivity, rng.random(count) >= specificity)


def test_ppi_covers_the_truth_that_the_detector_alone_misses():
    rng, covered, alone = np.random.default_rng(1), 0, 0
    for _ in range(600):
        y, f = draw(rng, 60, 0.3, 0.85, 0.85)
        _, rest = draw(rng, 200, 0.3, 0.85, 0.85)
        found = ppi_mean(y, f, rest)
        half = 1.96 * np.sqrt(rest.mean() * (1 - rest.mean()) / len(rest))
        covered += found.low <= 0.3 <= found.high
        alone += abs(rest.mean() - 0.3) <= half
    assert 0.91 <= covered / 600 <= 0.97  # published: 0.94
    assert 0.45 <= alone / 600 <= 0.62  # published: 0.53


def test_few_grades_give_the_peoples_own_rate():
    few = estimate_true_rate(GRADES[:30], VERDICTS[:30], OTHERS)
    assert few.method == "Wilson, people only" and few.graded == 30
    rare = estimate_true_rate([True] * 4 + [False] * 96, [True] * 4 + [False] * 96, OTHERS)
    assert rare.method == "Wilson, people only"
    assert estimate_true_rate(GRADES, VERDICTS, OTHERS).method == "PPI++"

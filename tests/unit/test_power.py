"""How many to grade: the published sample sizes, and exact power against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import fisher_exact
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

from hallulib.evaluation import power as pw
from hallulib.evaluation.statistics import mcnemar_exact, wilson_interval

pytestmark = pytest.mark.unit


def test_the_effect_size_has_the_golden_values_and_is_that_of_statsmodels():
    assert pw.cohen_h(0.6, 0.3) == pytest.approx(0.613, abs=5e-4)
    assert pw.cohen_h(0.6, 0.15) == pytest.approx(0.977, abs=5e-4)
    assert pw.cohen_h(0.2, 0.7) == pytest.approx(proportion_effectsize(0.2, 0.7))


@pytest.mark.parametrize(
    ("half_width", "n"), [(0.20, 20), (0.15, 38), (0.10, 89), (0.05, 366)]
)
def test_the_items_for_one_rate_are_the_published_ones(half_width, n):
    assert pw.items_for_interval(0.6, half_width) == n


def test_the_items_for_one_rate_agree_with_the_interval_itself():
    n = pw.items_for_interval(0.5, 0.1)
    for count, reached in ((n, True), (n - 2, False)):
        interval = wilson_interval(count // 2, count)
        assert ((interval.high - interval.low) / 2 <= 0.1) is reached
    with pytest.raises(ValueError, match="need shares"):
        pw.items_for_interval(60, 10)


@pytest.mark.parametrize(("after", "n"), [(0.3, 42.0), (0.15, 16.9)])
def test_the_unpaired_sample_size_per_arm_has_the_golden_values(after, n):
    found = pw.unpaired_sample_size(0.6, after)
    assert found == np.ceil(n)
    other = NormalIndPower().solve_power(pw.cohen_h(0.6, after), power=0.8, alpha=0.05)
    assert found == pytest.approx(other, abs=1)  # arcsine: 41.8 and 16.5


@pytest.mark.parametrize(
    ("after", "new_errors", "n"),
    [(0.3, 0.0, 23.7), (0.15, 0.0, 14.8), (0.3, 0.05, 32.4), (0.15, 0.05, 18.8), (0.3, 0.12, 44.7),
     (0.15, 0.06, 19.6)],
)  # fmt: skip
def test_the_paired_sample_size_rounds_the_published_formula_up(after, new_errors, n):
    assert pw.paired_sample_size(0.6, after, new_errors) == np.ceil(n)


@pytest.mark.parametrize("size", [pw.paired_sample_size, pw.unpaired_sample_size])
def test_equal_rates_have_no_sample_size(size):
    with pytest.raises(ValueError, match="no difference"):
        size(0.4, 0.4)


@pytest.mark.parametrize(
    ("after", "new_errors", "exact", "mid_p"),
    [(0.3, 0.0, 25, 21), (0.3, 0.05, 36, 31), (0.3, 0.12, 50, 45), (0.15, 0.0, 16, 14),
     (0.15, 0.05, 21, 18), (0.15, 0.06, 22, 19)],
)  # fmt: skip
def test_exact_enumeration_gives_the_published_number_of_paired_items(
    after, new_errors, exact, mid_p
):
    for test, n in (("exact", exact), ("mid_p", mid_p)):
        assert pw.smallest_n(
            lambda n, t=test: pw.paired_power(n, 0.6, after, new_errors, t), longest=70
        ) == n  # fmt: skip


@pytest.mark.parametrize(("after", "n"), [(0.3, 48), (0.15, 22)])
def test_exact_enumeration_gives_the_published_number_per_arm_for_fisher(after, n):
    assert pw.smallest_n(lambda n: pw.unpaired_power(n, 0.6, after), longest=60) == n


def test_ten_items_have_the_published_power_which_is_next_to_none():
    assert pw.unpaired_power(10, 0.6, 0.3) == pytest.approx(0.12, abs=5e-3)
    assert pw.unpaired_power(10, 0.6, 0.15) == pytest.approx(0.35, abs=5e-3)
    assert pw.paired_power(10, 0.6, 0.3, 0.0) == pytest.approx(0.047, abs=5e-4)
    assert pw.paired_power(10, 0.6, 0.3, 0.0, "mid_p") == pytest.approx(0.15, abs=5e-3)
    assert pw.paired_power(10, 0.6, 0.15, 0.0, "mid_p") == pytest.approx(0.50, abs=5e-3)


def test_the_power_of_fishers_test_agrees_with_scipy_table_by_table():
    n, first, second = 7, 0.7, 0.1
    from scipy.stats import binom

    total = sum(
        binom.pmf(a, n, first) * binom.pmf(b, n, second)
        for a in range(n + 1) for b in range(n + 1)
        if fisher_exact([[a, n - a], [b, n - b]]).pvalue < 0.05
    )  # fmt: skip
    assert pw.unpaired_power(n, first, second) == pytest.approx(total)


def test_paired_power_agrees_with_simulation():
    rng = np.random.default_rng(0)
    b, c, _ = rng.multinomial(30, [0.35, 0.05, 0.6], size=4000).T
    simulated = np.mean([mcnemar_exact(x, y) < 0.05 for x, y in zip(b, c, strict=True)])
    assert pw.paired_power(30, 0.6, 0.3, 0.05) == pytest.approx(simulated, abs=0.025)


def test_the_detectable_rates_are_the_published_ones():
    found = [pw.detectable_after(n, 0.6) for n in (10, 20, 30, 50, 100, 200)]
    assert found == [None, 0.19, 0.29, 0.39, 0.46, 0.51]


def test_rates_that_cannot_be_are_refused_and_an_unreachable_power_is_named():
    with pytest.raises(ValueError, match="impossible rates"):
        pw.paired_power(10, 0.6, 0.02, 0.05)
    with pytest.raises(ValueError, match="not reached by n = 12"):
        pw.smallest_n(lambda n: pw.paired_power(n, 0.6, 0.5), longest=12)


def test_six_fixed_items_are_the_fewest_that_show_anything():
    assert pw.fewest_fixed_to_show() == 6
    assert mcnemar_exact(pw.fewest_fixed_to_show(2), 2) < 0.05
    assert mcnemar_exact(pw.fewest_fixed_to_show(2) - 1, 2) >= 0.05

"""The statistics against golden values, independent libraries and exact enumeration."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from hallulib.evaluation import statistics as st

pytestmark = pytest.mark.unit
REAL = Path(__file__).parents[3] / "shared" / "realdata" / "mts-dialog" / "manual_scores.csv"


def test_six_of_ten_is_31_to_83_percent():
    interval = st.wilson_interval(6, 10)
    assert (interval.low, interval.high) == pytest.approx((0.312674, 0.831820), abs=1e-6)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(3, 10, 0.108, 0.603), (1, 10, 0.018, 0.404), (0, 10, 0.0, 0.278), (0, 30, 0.0, 0.114),
     (60, 100, 0.502, 0.691), (30, 100, 0.219, 0.396), (300, 1000, 0.272, 0.329)],
)  # fmt: skip
def test_wilson_gives_the_published_table(k, n, low, high):
    interval = st.wilson_interval(k, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-4)


def test_wilson_agrees_with_statsmodels_at_another_level():
    interval = st.wilson_interval(7, 31, level=0.9)
    expected = proportion_confint(7, 31, alpha=0.1, method="wilson")
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_clopper_pearson_of_six_of_ten():
    interval = st.clopper_pearson_interval(6, 10)
    assert (interval.low, interval.high) == pytest.approx((0.2624, 0.8784), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(ValueError, match="k <= n"):
        st.wilson_interval(k, n)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(6, 0, 0.03125), (4, 0, 0.125), (5, 0, 0.0625), (12, 4, 0.0768), (35, 5, 1.38e-6),
     (0, 0, 1.0), (3, 3, 1.0)],
)  # fmt: skip
def test_exact_mcnemar_gives_the_golden_values(b, c, p):
    assert st.mcnemar_exact(b, c) == pytest.approx(p, rel=2e-3)
    assert st.mcnemar_exact(c, b) == st.mcnemar_exact(b, c)


def test_exact_mcnemar_agrees_with_statsmodels():
    for b, c in [(1, 9), (7, 11), (20, 3)]:
        assert st.mcnemar_exact(b, c) == pytest.approx(mcnemar([[5, b], [c, 5]], exact=True).pvalue)


def test_mid_p_gives_the_golden_values_and_the_textbook_formula():
    assert st.mcnemar_mid_p(12, 4) == pytest.approx(0.049, abs=5e-4)
    assert st.mcnemar_mid_p(4, 0) == pytest.approx(0.0625)
    assert st.mcnemar_mid_p(3, 3) == pytest.approx(1.0)
    assert st.mcnemar_mid_p(0, 0) == 1.0
    for b, c in [(9, 2), (5, 7), (1, 1), (30, 12)]:
        low, n = min(b, c), b + c
        textbook = 2 * binom.cdf(low, n, 0.5) - binom.pmf(low, n, 0.5)
        assert st.mcnemar_mid_p(b, c) == pytest.approx(textbook)


def test_bonett_price_gives_the_golden_intervals():
    small = st.bonett_price_interval(4, 0, 10)
    assert (small.low, small.high) == pytest.approx((-0.02, 0.69), abs=5e-3)
    large = st.bonett_price_interval(35, 5, 100)
    assert (large.low, large.high) == pytest.approx((0.18, 0.40), abs=5e-3)


def test_bonett_price_holds_its_level_where_wald_does_not():
    """Exact coverage at n = 10 by enumeration (b, c trinomial): nominal 95 %."""
    p_b, p_c, n = 0.3, 0.05, 10
    covered = 0.0
    for b in range(n + 1):
        for c in range(n - b + 1):
            interval = st.bonett_price_interval(b, c, n)
            weight = binom.pmf(b, n, p_b) * binom.pmf(c, n - b, p_c / (1 - p_b))
            covered += weight * (interval.low <= p_b - p_c <= interval.high)
    assert 0.95 <= covered <= 0.985


def test_a_paired_comparison_counts_each_cell():
    before = [True] * 6 + [False] * 4
    after = [True, True, False, False, False, False, True, False, False, False]
    result = st.compare_paired(before, after)
    assert (result.both_bad, result.b, result.c, result.both_good) == (2, 4, 1, 3)
    assert result.difference == pytest.approx(0.3)
    assert result.p_exact == st.mcnemar_exact(4, 1)
    assert result.low < result.difference < result.high


def test_a_paired_comparison_refuses_lists_that_do_not_match():
    with pytest.raises(ValueError, match="equally long"):
        st.compare_paired([True], [True, False])


def test_the_unpaired_comparison_gives_the_golden_values():
    small = st.compare_unpaired(6, 10, 3, 10)
    assert small.p_fisher == pytest.approx(0.3698, abs=5e-5)
    assert (small.low, small.high) == pytest.approx((-0.12, 0.60), abs=5e-3)
    assert st.compare_unpaired(6, 10, 1, 10).p_fisher == pytest.approx(0.057, abs=5e-4)
    ours, theirs = st.compare_unpaired(17, 40, 9, 35), confint_proportions_2indep(17, 40, 9, 35)
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=5e-3)


def test_clustered_statements_give_a_wider_interval_than_independent_ones():
    wrong, total = [10, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 3, [10] * 30
    clustered = st.cluster_bootstrap_ratio(wrong, total, seed=1)
    pooled = st.wilson_interval(sum(wrong), sum(total))
    assert clustered.low <= 0.1 <= clustered.high
    assert clustered.high - clustered.low > 1.5 * (pooled.high - pooled.low)
    assert clustered == st.cluster_bootstrap_ratio(wrong, total, seed=1)
    with pytest.raises(ValueError, match="non-zero"):
        st.cluster_bootstrap_ratio([0], [0])


def test_cochrans_q_and_holm_are_those_of_statsmodels():
    from statsmodels.stats.contingency_tables import cochrans_q, mcnemar
    from statsmodels.stats.multitest import multipletests

    table = np.random.default_rng(0).random((4, 60)) < [[0.5], [0.3], [0.2], [0.25]]
    expected = cochrans_q(table.T)
    assert st.cochran_q(table) == pytest.approx((expected.statistic, expected.pvalue))
    # Of two systems it is McNemar's chi-square without correction.
    a, b = table[:2]
    pair = [[sum(a & b), sum(a & ~b)], [sum(~a & b), sum(~a & ~b)]]
    assert st.cochran_q(table[:2])[1] == pytest.approx(
        mcnemar(pair, exact=False, correction=False).pvalue
    )
    p_values = [0.04, 0.001, 0.03, 0.2, 0.03]
    assert st.adjust_holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert st.adjust_holm([]) == []


def test_systems_that_never_differ_have_no_q():
    assert st.cochran_q([[True, False], [True, False], [True, False]]) == (0.0, 1.0)
    for wrong in ([[True, False]], [[], []]):
        with pytest.raises(ValueError, match="two systems on the same items"):
            st.cochran_q(wrong)


@pytest.fixture(scope="module")
def grades():
    """Human grades (4 systems, 100 dialogues) per rate: column -> array."""
    if not REAL.exists():
        pytest.skip("the MTS-Dialog grades are not beside the checkout")
    with REAL.open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    return {
        name: np.array([float(row[name]) for row in rows]).reshape(4, 100)
        for name in ("HallucinationRate", "FactualPrecision")
    }


def test_the_real_mts_dialog_grades_give_the_published_counts(grades):
    hallucinated = grades["HallucinationRate"] > 0
    assert hallucinated.sum(axis=1).tolist() == [6, 12, 4, 11]
    assert (grades["FactualPrecision"] < 1).sum(axis=1).tolist() == [12, 28, 17, 29]
    result = st.compare_paired(list(hallucinated[1]), list(hallucinated[2]))
    assert (result.b, result.c) == (12, 4)
    assert result.p_exact == pytest.approx(0.0768, abs=5e-5)
    assert result.p_exact > 0.05 > result.p_mid  # the methods straddle 5 %: choose one before


def test_the_four_real_systems_at_once_give_the_published_p(grades):
    unsupported, hallucinated = grades["FactualPrecision"] < 1, grades["HallucinationRate"] > 0
    assert st.cochran_q(unsupported)[1] == pytest.approx(0.0006, abs=5e-5)
    assert st.cochran_q(hallucinated)[1] == pytest.approx(0.10, abs=5e-3)


def test_the_same_real_grades_are_2_or_8_or_21_percent_by_their_unit(grades):
    rates = grades["HallucinationRate"]
    assert round(rates.mean(), 3) == 0.023
    assert (rates > 0).mean() == pytest.approx(33 / 400)
    assert (grades["FactualPrecision"] < 1).mean() == pytest.approx(86 / 400)


def test_the_bootstrap_of_real_paired_differences_gives_the_published_interval(grades):
    bad = grades["HallucinationRate"] > 0
    differences = bad[1].astype(float) - bad[2]
    interval = st.cluster_bootstrap_ratio(differences, [1] * 100, seed=0)
    assert (interval.low, interval.high) == pytest.approx((0.01, 0.16), abs=0.011)

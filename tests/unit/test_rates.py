"""Rates against golden values, published tables, independent libraries and exact enumeration."""

from __future__ import annotations

import krippendorff
import numpy as np
import pandas as pd
import pytest
from data_factory import REAL
from scipy.stats import binom, binomtest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep

from hallulib import rates
from hallulib.evaluation.metrics import compare_together

pytestmark = pytest.mark.unit
GRADES_FILE = REAL / "mts-dialog" / "manual_scores.csv"


def compare_counts(b: int, c: int, n: int) -> dict:
    """The paired comparison of n items of which b were fixed and c broken."""
    before = [True] * b + [False] * (n - b)
    return rates.compare_paired(before, [False] * b + [True] * c + [False] * (n - b - c))


# --- one rate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(6, 10, 0.312674, 0.831820), (3, 10, 0.108, 0.603), (1, 10, 0.018, 0.404), (0, 10, 0, 0.278),
     (0, 30, 0, 0.114), (60, 100, 0.502, 0.691), (30, 100, 0.219, 0.396),
     (300, 1000, 0.272, 0.329)],
)  # fmt: skip
def test_wilson_gives_the_published_table_and_agrees_with_scipy(k, n, low, high):
    found = rates.rate(k, n, "summaries")
    places = 1e-6 if k == 6 else 6e-4  # the case's own example is known to six
    assert (found.low, found.high) == pytest.approx((low, high), abs=places)
    scipy = binomtest(k, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=1e-12)


def test_counts_that_are_no_rate_are_refused_and_a_rate_of_nothing_is_none():
    for k, n in ((-1, 3), (4, 3), (137, 100), (1, 0)):
        with pytest.raises(ValueError, match="k <= n"):
            rates.rate(k, n, "summaries")
    with pytest.raises(ValueError, match="more statements"):
        rates.ratio([3], [2], "statements")
    assert rates.rate(0, 0, "summaries") is None
    assert rates.ratio([0, 0], [0, 0], "statements") is None


def test_rates_percents_and_p_values_are_written_for_a_reader():
    assert str(rates.rate(6, 10, "summaries")) == "6 of 10 summaries (60 %, 31-83 %)"
    shares = (0, 0.005, 0.0994, 0.125, 1)
    assert [rates.percent(x) for x in shares] == ["0", "0.5", "9.9", "12", "100"]
    assert rates.format_p(3.3e-139) == "p < 0.001" and rates.format_p(0.03125) == "p = 0.031"


def test_clustered_statements_give_a_wider_interval_than_independent_ones():
    wrong, total = [10, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 3, [10] * 30
    clustered = rates.ratio(wrong, total, "statements", seed=1)
    pooled = rates.rate(sum(wrong), sum(total), "statements")
    assert clustered.low <= 0.1 <= clustered.high
    assert clustered.high - clustered.low > 1.5 * (pooled.high - pooled.low)
    assert clustered == rates.ratio(wrong, total, "statements", seed=1)


# --- two systems ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(6, 0, 0.03125), (4, 0, 0.125), (5, 0, 0.0625), (12, 4, 0.0768), (35, 5, 1.38e-6),
     (0, 0, 1.0), (3, 3, 1.0)],
)  # fmt: skip
def test_exact_mcnemar_gives_the_golden_values_and_those_of_statsmodels(b, c, p):
    found = compare_counts(b, c, 100)["p"]
    assert found == pytest.approx(p, rel=2e-3)
    assert compare_counts(c, b, 100)["p"] == pytest.approx(found)
    assert found == pytest.approx(mcnemar([[0, b], [c, 0]], exact=True).pvalue if b + c else 1)


def test_mid_p_gives_the_golden_values_and_the_textbook_formula():
    assert compare_counts(12, 4, 100)["p_mid"] == pytest.approx(0.049, abs=5e-4)
    assert compare_counts(4, 0, 10)["p_mid"] == pytest.approx(0.0625)
    assert compare_counts(0, 0, 10)["p_mid"] == 1.0
    for b, c in [(9, 2), (5, 7), (1, 1), (3, 3), (30, 12)]:
        low, n = min(b, c), b + c
        textbook = 2 * binom.cdf(low, n, 0.5) - binom.pmf(low, n, 0.5)
        assert compare_counts(b, c, 50)["p_mid"] == pytest.approx(textbook)


def test_bonett_price_gives_the_golden_intervals():
    small, large = compare_counts(4, 0, 10), compare_counts(35, 5, 100)
    assert (small["low"], small["high"]) == pytest.approx((-0.02, 0.69), abs=5e-3)
    assert (large["low"], large["high"]) == pytest.approx((0.18, 0.40), abs=5e-3)


def test_bonett_price_holds_its_level_where_wald_does_not():
    """Exact coverage at n = 10 by enumeration (b, c trinomial): nominal 95 %."""
    p_b, p_c, n = 0.3, 0.05, 10
    covered = 0.0
    for b in range(n + 1):
        for c in range(n - b + 1):
            found = compare_counts(b, c, n)
            weight = binom.pmf(b, n, p_b) * binom.pmf(c, n - b, p_c / (1 - p_b))
            covered += weight * (found["low"] <= p_b - p_c <= found["high"])
    assert 0.95 <= covered <= 0.985


def test_a_paired_comparison_counts_each_cell_and_refuses_lists_that_do_not_match():
    before = [True] * 6 + [False] * 4
    after = [True, True, False, False, False, False, True, False, False, False]
    found = rates.compare_paired(before, after)
    assert (found["n"], found["b"], found["c"]) == (10, 4, 1)
    assert found["difference"] == pytest.approx(0.3)
    assert found["low"] < found["difference"] < found["high"]
    for left, right in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="zip|no items"):
            rates.compare_paired(left, right)


def test_the_unpaired_comparison_gives_the_golden_values():
    small = rates.compare_unpaired(6, 10, 3, 10)
    assert small["p"] == pytest.approx(0.3698, abs=5e-5)
    assert (small["low"], small["high"]) == pytest.approx((-0.12, 0.60), abs=5e-3)
    assert rates.compare_unpaired(6, 10, 1, 10)["p"] == pytest.approx(0.057, abs=5e-4)
    ours, theirs = rates.compare_unpaired(17, 40, 9, 35), confint_proportions_2indep(17, 40, 9, 35)
    assert (ours["low"], ours["high"]) == pytest.approx(theirs, abs=5e-3)


# --- agreement ------------------------------------------------------------------------------


def test_kappa_falls_at_94_percent_agreement_when_errors_are_rare_and_shows_its_interval():
    first = [1] * 2 + [0] * 92 + [1] * 3 + [0] * 3
    second = [1] * 2 + [0] * 92 + [0] * 3 + [1] * 3
    found = rates.kappa(first, second)
    assert found.value == pytest.approx(0.3684, abs=1e-4)
    assert found.low < 0.3 < found.high and found.n == 100
    assert str(found) == f"0.37 ({found.low:.2f} to {found.high:.2f})"


@pytest.mark.parametrize("seed", range(5))
def test_kappa_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 3, 40).tolist(), rng.integers(0, 3, 40).tolist()
    assert rates.kappa(first, second).value == pytest.approx(cohen_kappa_score(first, second))
    with pytest.raises(ValueError, match="zip"):
        rates.kappa(first, second[1:])


def test_agreement_without_variation_is_undefined_and_not_one():
    assert rates.kappa(["ok"] * 12, ["ok"] * 12) is None
    assert rates.kappa(["ok"] * 5, ["bad"] * 5).value == 0  # constant, yet they differ
    assert rates.alpha([[1] * 12, [1] * 12]) is None
    assert rates.alpha([[1, np.nan], [np.nan, 2]]) is None  # nobody graded the same item
    rare = [1] + [0] * 30
    assert str(rates.kappa(rare, rare)) == "1.00 (too little varies for an interval)"


def test_alpha_gives_the_published_example_and_agrees_with_the_library():
    x = np.nan  # the worked example of Wikipedia's article on the coefficient
    raters = [
        [x, x, x, x, x, 3, 4, 1, 2, 1, 1, 3, 3, x, 3],
        [1, x, 2, 1, 3, 3, 4, 3, x, x, x, x, x, x, x],
        [x, x, 2, 1, 3, 4, 4, x, 2, 1, 1, 3, 3, x, 4],
    ]
    assert rates.alpha(raters) == pytest.approx(0.691, abs=5e-4)
    expected = krippendorff.alpha(raters, level_of_measurement="nominal")
    assert rates.alpha(raters) == pytest.approx(expected)


# --- a detector corrected by people ---------------------------------------------------------

GRADES = [float(i % 3 == 0) for i in range(40)]
VERDICTS = [y if i % 6 else 1 - y for i, y in enumerate(GRADES)]
OTHERS = [float((i * 7) % 20 < 8) for i in range(200)]


def test_ppi_agrees_with_the_reference_library():
    """ppi_py 0.2.3 on these very numbers; it divides by n where we divide by n - 1."""
    found = rates.correct_by_people(GRADES, VERDICTS, OTHERS, "summaries")
    bounds = (found.value, found.low, found.high)
    assert bounds == pytest.approx((0.441908, 0.315391, 0.568424), abs=4e-3)
    assert (found.method, found.n, found.k) == ("PPI++", 40, None)
    assert str(found) == "44 % (32-57 %)"


def test_a_useless_detector_is_ignored_and_a_good_one_narrows_the_interval():
    silent = rates.correct_mean(GRADES, [0.0] * 40, [0.0] * 200)
    assert silent == pytest.approx((0.35, 0.202188, 0.497812), abs=4e-3)  # people alone
    tuned = rates.correct_mean(GRADES, VERDICTS, OTHERS)
    assert tuned[2] - tuned[1] < silent[2] - silent[1]
    with pytest.raises(ValueError, match="dimensions"):
        rates.correct_mean([1, 0], [1], [0, 1])


def draw(rng, count: int):
    """Truth (30 %) and the verdict of a detector that is right in 85 %."""
    y = rng.random(count) < 0.3
    return y, np.where(y, rng.random(count) < 0.85, rng.random(count) >= 0.85)


def test_ppi_covers_the_truth_that_the_detector_alone_misses():
    rng, covered, alone = np.random.default_rng(1), 0, 0
    for _ in range(600):
        (y, f), (_, rest) = draw(rng, 60), draw(rng, 200)
        _, low, high = rates.correct_mean(y, f, rest)
        half = 1.96 * np.sqrt(rest.mean() * (1 - rest.mean()) / len(rest))
        covered += low <= 0.3 <= high
        alone += abs(rest.mean() - 0.3) <= half
    assert 0.91 <= covered / 600 <= 0.97  # published: 0.94
    assert 0.45 <= alone / 600 <= 0.62  # published: 0.53


def test_few_grades_give_the_peoples_own_rate():
    few = rates.correct_by_people(GRADES[:30], VERDICTS[:30], OTHERS, "summaries")
    assert (few.method, few.k, few.n) == ("Wilson", 10, 30)
    rare = [True] * 4 + [False] * 96
    assert rates.correct_by_people(rare, rare, OTHERS, "summaries").method == "Wilson"
    assert rates.correct_by_people([], [], OTHERS, "summaries") is None


# --- how many -------------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "n"), [(0.20, 20), (0.15, 38), (0.10, 89), (0.05, 366)])
def test_the_items_for_one_rate_are_the_published_ones(half, n):
    assert rates.items_for_interval(0.6, half) == n


@pytest.mark.parametrize(
    ("after", "broken", "exact", "mid_p"),
    [(0.3, 0.0, 25, 21), (0.3, 0.05, 36, 31), (0.3, 0.12, 50, 45), (0.15, 0.0, 16, 14),
     (0.15, 0.05, 21, 18), (0.15, 0.06, 22, 19)],
)  # fmt: skip
def test_exact_power_is_four_in_five_from_the_published_number_of_items(
    after, broken, exact, mid_p
):
    for kind, n in ((False, exact), (True, mid_p)):
        powers = [rates.paired_power(m, 0.6, after, broken, kind) for m in range(n - 1, n + 9)]
        assert powers[0] < 0.8 <= min(powers[1:])  # exact power goes in saw teeth


def test_ten_items_have_the_published_power_which_is_next_to_none():
    assert rates.paired_power(10, 0.6, 0.3, 0.0) == pytest.approx(0.047, abs=5e-4)
    assert rates.paired_power(10, 0.6, 0.3, 0.0, mid_p=True) == pytest.approx(0.15, abs=5e-3)
    assert rates.paired_power(10, 0.6, 0.15, 0.0, mid_p=True) == pytest.approx(0.50, abs=5e-3)
    with pytest.raises(ValueError, match="impossible rates"):
        rates.paired_power(10, 0.6, 0.02)


def test_paired_power_agrees_with_simulation():
    rng = np.random.default_rng(0)
    b, c, _ = rng.multinomial(30, [0.35, 0.05, 0.6], size=2000).T
    found = np.mean([binomtest(x, x + y).pvalue < 0.05 for x, y in zip(b, c, strict=True)])
    assert rates.paired_power(30, 0.6, 0.3) == pytest.approx(found, abs=0.03)


def test_the_detectable_rates_are_the_published_ones():
    found = [rates.detectable_after(n, 0.6) for n in (10, 20, 30, 50, 100, 200)]
    assert found == [None, 0.19, 0.29, 0.39, 0.46, 0.51]


# --- people's grades of real summaries ------------------------------------------------------


@pytest.mark.skipif(not GRADES_FILE.exists(), reason="python -m hallulib fetch mts-dialog")
def test_real_grades_give_the_published_counts_p_values_and_intervals():
    """4 systems, 100 dialogues: 2, 8 or 21 percent are wrong, by the unit."""
    frame = pd.read_csv(GRADES_FILE, encoding="utf-8-sig")
    shares = frame["HallucinationRate"].to_numpy().reshape(4, 100)
    hallucinated, unsupported = shares > 0, (frame["FactualPrecision"] < 1).to_numpy()
    unsupported = unsupported.reshape(4, 100)
    assert round(shares.mean(), 3) == 0.023
    assert hallucinated.sum(axis=1).tolist() == [6, 12, 4, 11]
    assert unsupported.sum(axis=1).tolist() == [12, 28, 17, 29]
    found = rates.compare_paired(hallucinated[1], hallucinated[2])
    assert (found["b"], found["c"]) == (12, 4)
    assert found["p"] > 0.05 > found["p_mid"]  # the methods straddle 5 %: choose one before
    p_values = [compare_together(pd.DataFrame(x.T))["p"] for x in (unsupported, hallucinated)]
    assert p_values == pytest.approx([0.0006, 0.10], abs=5e-3)
    assert p_values[0] == pytest.approx(0.0006, abs=5e-5)
    bounds = rates.resample(np.mean, hallucinated[1].astype(float) - hallucinated[2])
    assert bounds == pytest.approx((0.01, 0.16), abs=0.011)

"""Agreement beyond chance against statsmodels, the krippendorff library and textbooks."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from hallulib.evaluation import agreement as ag

pytestmark = pytest.mark.unit
NONE = None
# Three raters, fifteen items, gaps: the worked example of Wikipedia's article on the coefficient.
RATERS = [
    [NONE, NONE, NONE, NONE, NONE, 3, 4, 1, 2, 1, 1, 3, 3, NONE, 3],
    [1, NONE, 2, 1, 3, 3, 4, 3, NONE, NONE, NONE, NONE, NONE, NONE, NONE],
    [NONE, NONE, 2, 1, 3, 4, 4, NONE, 2, 1, 1, 3, 3, NONE, 4],
]


@pytest.mark.parametrize(
    ("level", "value"), [("nominal", 0.691), ("interval", 0.811), ("ordinal", 0.807)]
)
def test_alpha_gives_the_published_example_and_agrees_with_the_library(level, value):
    found = ag.krippendorff_alpha(RATERS, level)
    assert found == pytest.approx(value, abs=5e-4)
    data = [[np.nan if grade is None else grade for grade in row] for row in RATERS]
    assert found == pytest.approx(krippendorff.alpha(data, level_of_measurement=level))


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_agrees_with_the_library_on_random_grades_with_gaps(level):
    rng = np.random.default_rng(3)
    for _ in range(10):
        data = rng.integers(-2, 3, size=(4, 25)).astype(float)
        data[rng.random(data.shape) < 0.3] = np.nan
        rows = [[None if np.isnan(g) else g for g in row] for row in data]
        expected = krippendorff.alpha(data, level_of_measurement=level)
        assert ag.krippendorff_alpha(rows, level) == pytest.approx(expected)


def test_agreement_without_variation_is_undefined_and_not_one():
    same = ["faithful"] * 12
    assert ag.krippendorff_alpha([same, same]) is None
    assert ag.cohen_kappa(same, same) is None
    assert ag.gwet_ac1(same, same) is None
    assert ag.krippendorff_alpha([[1, None], [None, 2]]) is None  # nobody graded the same item


def rare_error_grades():
    """94 % agreement on 100 items of which 5 % are called wrong by each rater."""
    return [1] * 2 + [0] * 92 + [1] * 3 + [0] * 3, [1] * 2 + [0] * 92 + [0] * 3 + [1] * 3


def test_kappa_falls_to_037_at_94_percent_agreement_when_errors_are_rare():
    first, second = rare_error_grades()
    assert ag.cohen_kappa(first, second) == pytest.approx(0.37, abs=5e-3)
    assert ag.prevalence_adjusted_kappa(first, second) == pytest.approx(0.88)
    assert ag.gwet_ac1(first, second) > 0.9


@pytest.mark.parametrize("weights", [None, "quadratic", "linear"])
def test_kappa_agrees_with_statsmodels_also_where_a_middle_grade_was_never_given(weights):
    first, second = [0, 0, 1, 3, 3, 3, 1, 0], [0, 1, 1, 3, 3, 1, 0, 0]
    table = np.zeros((4, 4))
    for a, b in zip(first, second, strict=True):
        table[a, b] += 1
    kind = {None: None, "quadratic": "quadratic", "linear": "linear"}[weights]
    expected = cohens_kappa(table, wt=kind, return_results=False)
    assert ag.cohen_kappa(first, second, weights) == pytest.approx(expected)


def test_perfect_agreement_is_one_and_words_can_be_grades():
    grades = ["supported", "hallucinated", "supported"]
    assert ag.cohen_kappa(grades, grades) == pytest.approx(1)
    assert ag.krippendorff_alpha([grades, grades]) == pytest.approx(1)
    assert ag.gwet_ac1(grades, grades) == pytest.approx(1)


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        ag.cohen_kappa([1], [1, 0])
    with pytest.raises(ValueError, match="different numbers of items"):
        ag.krippendorff_alpha([[1, 0], [1]])


def test_the_bootstrap_interval_holds_the_value_and_says_nothing_where_nothing_varies():
    first, second = rare_error_grades()
    interval = ag.bootstrap_agreement(ag.gwet_ac1, first, second, resamples=300, seed=1)
    assert interval.low < ag.gwet_ac1(first, second) < interval.high
    assert interval == ag.bootstrap_agreement(ag.gwet_ac1, first, second, resamples=300, seed=1)
    rows = [[1, 0] * 10, [1, 0] * 9 + [0, 1]]
    alpha = ag.bootstrap_agreement(lambda *r: ag.krippendorff_alpha(r), *rows, resamples=200)
    assert alpha.low < ag.krippendorff_alpha(rows) <= alpha.high
    rare = [1] + [0] * 30
    assert ag.bootstrap_agreement(ag.cohen_kappa, rare, rare, resamples=200) is None

"""The simulated study: what each method reports when the detector has changed, and when not."""

from __future__ import annotations

import pytest

from hallulib import plots
from hallulib.evaluation.simulation import METHODS, Arm, simulate_reports

pytestmark = pytest.mark.unit
ALONE, OLD, PEOPLE, BOTH = METHODS
FIRST, PLEASED = Arm(0.60, 0.85, 0.85), Arm(0.50, 0.55, 0.95)


def test_a_detector_that_was_trained_on_reports_far_more_than_the_true_fall():
    """Published for a true fall of 10 points: 27 by the detector, 38 corrected by its old rates."""
    found = simulate_reports(FIRST, PLEASED)
    assert found[ALONE]["mean"] == pytest.approx(0.27, abs=0.01)
    assert found[OLD]["mean"] == pytest.approx(0.38, abs=0.02)
    assert found[ALONE]["low"] > 0.15  # and it is sure of it
    assert found[PEOPLE]["mean"] == pytest.approx(0.10, abs=0.015)
    assert found[BOTH]["mean"] == pytest.approx(0.10, abs=0.015)


def test_people_with_the_detector_are_surer_than_people_alone_and_keep_their_level():
    found = simulate_reports(FIRST, PLEASED)
    width = {name: found[name]["high"] - found[name]["low"] for name in (PEOPLE, BOTH)}
    assert width[BOTH] < width[PEOPLE]
    assert 0.91 <= found[BOTH]["covered"] <= 0.97


def test_a_detector_that_stayed_the_same_is_put_right_by_its_error_rates():
    found = simulate_reports(FIRST, Arm(0.50, 0.85, 0.85), graded=200, scored=1000, studies=200)
    assert found[OLD]["mean"] == pytest.approx(0.10, abs=0.01)
    assert found[ALONE]["mean"] == pytest.approx(0.07, abs=0.01)  # 0.7 times the truth


def test_the_same_seed_gives_the_same_studies():
    options = {"studies": 20, "graded": 40}
    assert simulate_reports(FIRST, PLEASED, **options) == simulate_reports(
        FIRST, PLEASED, **options
    )


def test_the_figures_show_what_they_are_given():
    figure = plots.plot_reported_falls(simulate_reports(FIRST, PLEASED, studies=20), 0.1)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(METHODS)
    assert axis.get_legend().texts[0].get_text() == "the truth: 10%"
    (axis,) = plots.plot_power({"a": {5: 0.1, 10: 0.4}, "b": {5: 0.2}}).axes
    assert list(axis.lines[0].get_ydata()) == [0.1, 0.4]

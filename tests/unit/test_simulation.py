"""The simulated study of notebook 6: what each method reports when a detector has changed."""

from __future__ import annotations

import nbformat
import numpy as np
import pandas as pd
import pytest

from hallulib import rates
from hallulib.files import project_root

pytestmark = pytest.mark.unit
ALONE, OLD, PEOPLE, BOTH = (
    "detector alone", "corrected by its old error rates", "people alone", "people and detector",
)  # fmt: skip


@pytest.fixture(scope="module")
def lesson():
    """What the notebook's cells `drift-simulate` and `drift-study` define."""
    notebook = nbformat.read(project_root() / "notebooks" / "06_evaluation.ipynb", as_version=4)
    cells = {cell.id: cell.source for cell in notebook.cells}
    names = {"np": np, "rates": rates}
    for cell in ("drift-simulate", "drift-study"):
        exec(cells[cell], names)
    return names


@pytest.fixture(scope="module")
def reports(lesson):
    rng = np.random.default_rng(0)
    return pd.DataFrame([lesson["run_study"](rng) for _ in range(500)])


def test_a_detector_that_was_trained_on_reports_far_more_than_the_true_fall(reports):
    """Published for a true fall of 10 points: 27 by the detector, 38 corrected by its old rates."""
    mean = reports.mean()
    assert mean[ALONE] == pytest.approx(0.27, abs=0.01)
    assert mean[OLD] == pytest.approx(0.38, abs=0.02)
    assert reports[ALONE].quantile(0.025) > 0.15  # and it is sure of it
    assert mean[[PEOPLE, BOTH]].tolist() == pytest.approx([0.10, 0.10], abs=0.015)


def test_people_with_the_detector_are_surer_than_people_alone(reports):
    assert reports[BOTH].std() < reports[PEOPLE].std()


def test_rogan_gladen_gives_the_worked_example(lesson):
    """84 of 200 flagged; of 20 wrong items 17 caught, of 40 faithful ones 34 passed: 38.6 %."""
    verdicts = np.array([1.0] * 84 + [0.0] * 116)
    truth = np.array([1] * 20 + [0] * 40)
    called = np.array([1.0] * 17 + [0.0] * 3 + [1.0] * 6 + [0.0] * 34)
    found = lesson["correct_rate"](verdicts, truth, called)
    assert found == pytest.approx(0.385714, abs=1e-6)

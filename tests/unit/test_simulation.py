"""The simulated study of notebook 6: what each method reports when a detector has changed."""

from __future__ import annotations

import nbformat
import numpy as np
import pandas as pd
import pytest

from hallulib import rates
from hallulib.files import project_root

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def lesson():
    """What the notebook's cells `drift-simulate` and `drift-study` define."""
    notebook = nbformat.read(project_root() / "notebooks" / "06_evaluation.ipynb", as_version=4)
    cells = {cell.id: cell.source for cell in notebook.cells}
    names = {"np": np, "rates": rates}
    for cell in ("drift-simulate", "drift-study"):
        exec(cells[cell], names)
    return names


def test_a_detector_that_was_trained_on_reports_far_more_than_the_true_fall(lesson):
    """Published for a true fall of 10 points: 27 by the detector, 38 corrected by its old rates;
    people find it, and with the detector they are surer."""
    rng = np.random.default_rng(0)
    reports = pd.DataFrame([lesson["run_study"](rng) for _ in range(500)])
    reports.columns = ["alone", "old", "people", "both"]
    mean = reports.mean()
    assert mean["alone"] == pytest.approx(0.27, abs=0.01)
    assert mean["old"] == pytest.approx(0.38, abs=0.02)
    assert reports["alone"].quantile(0.025) > 0.15  # and it is sure of it
    assert mean[["people", "both"]].tolist() == pytest.approx([0.10, 0.10], abs=0.015)
    assert reports["both"].std() < reports["people"].std()


def test_rogan_gladen_gives_the_worked_example(lesson):
    """84 of 200 flagged; of 20 wrong items 17 caught, of 40 faithful ones 34 passed: 38.6 %."""
    verdicts = np.array([1.0] * 84 + [0.0] * 116)
    truth = np.array([1] * 20 + [0] * 40)
    called = np.array([1.0] * 17 + [0.0] * 3 + [1.0] * 6 + [0.0] * 34)
    found = lesson["correct_rate"](verdicts, truth, called)
    assert found == pytest.approx(0.385714, abs=1e-6)

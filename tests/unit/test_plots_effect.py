"""The figure of pairs by origin, and that the shipped figures say what notebook 5 says of them."""

from __future__ import annotations

import sys

import pandas as pd
import pytest

from hallulib.files import project_root

BENCHMARKS = project_root() / "benchmarks"
sys.path.append(str(BENCHMARKS))
from effect_by_pair_origin import plot_effect_by_origin  # noqa: E402

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def effect():
    return pd.read_csv(BENCHMARKS / "effect_by_pair_origin.csv")


def test_every_run_of_the_benchmark_is_there_with_400_notes_each(effect):
    runs = effect.groupby(["seed", "origin", "asked"]).size()
    assert len(runs) == 27 and set(effect["n"]) == {400}
    assert (effect["pairs"] == effect["asked"]).all()


def test_the_figure_has_a_line_per_origin_and_system_and_shows_all_of_it(effect):
    figure = plot_effect_by_origin(effect)
    rates, omissions = figure.axes
    assert len(rates.containers) == len(omissions.containers) == 6
    assert rates.get_ylim()[1] > effect[effect["system"] == "sft"]["rate"].mean()
    line = next(c for c in rates.containers if c.get_label() == "twin, SFT on the chosen")
    part = effect[(effect["origin"] == "twin") & (effect["system"] == "sft_on_chosen")]
    expected = part.groupby("asked")["rate"].mean().tolist()
    assert line.lines[0].get_ydata().tolist() == pytest.approx(expected)


def test_what_the_notebook_says_holds_in_the_shipped_figures(effect):
    mean = effect.groupby(["origin", "system", "asked"])["rate"].mean().unstack()
    for asked in (50, 150, 450):
        assert mean.loc[("sampled", "dpo"), asked] < mean.loc[("sampled", "sft_on_chosen"), asked]
        for origin in ("perturbed", "twin"):
            assert mean.loc[(origin, "sft_on_chosen"), asked] < mean.loc[(origin, "dpo"), asked]
    assert mean.loc[("twin", "dpo")].is_monotonic_increasing
    assert mean.loc[("sampled", "dpo")].is_monotonic_decreasing

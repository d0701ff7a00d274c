"""The shipped figures of the effect: the same house after every redesign."""

import pandas as pd
import pytest

from hallulib.files import project_root

pytestmark = pytest.mark.static

ROWS = pd.read_csv(project_root() / "benchmarks" / "effect_over_seeds.csv")
OVERALL = ROWS[ROWS["styles"] == "all"]


def of_system(name):
    rows = OVERALL[OVERALL["system"] == name]
    assert sorted(rows["seed"]) == [0, 1, 2] and (rows["n"] == 400).all()
    return rows


def test_sft_hallucinates_in_half_to_three_quarters_of_the_summaries():
    assert of_system("sft")["rate"].between(0.50, 0.75).all()


def test_dpo_with_the_sft_term_ends_at_five_percent_or_less_and_leaves_little_out():
    rows = of_system("dpo")
    assert (rows["rate"] <= 0.05).all()
    assert (rows["omission_rate"] <= 0.02).all() and (rows["answer_rate"] == 1).all()


def test_the_fall_is_no_accident_on_any_seed():
    assert (of_system("dpo")["p_from_sft"] < 1e-6).all()


def test_the_control_is_beaten_on_every_seed():
    assert (of_system("sft_on_chosen")["p_to_dpo"] < 0.01).all()

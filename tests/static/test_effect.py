"""The shipped figures of the effect: the same house after every redesign."""

import pandas as pd
import pytest

from hallulib.files import project_root

pytestmark = pytest.mark.static


def test_the_effect_holds_on_every_seed():
    """SFT invents, DPO with the SFT term hardly does and omits little, the control is beaten."""
    rows = pd.read_csv(project_root() / "benchmarks" / "effect_over_seeds.csv")
    rows = rows[rows["styles"] == "all"]
    sft, dpo, control = (rows[rows["system"] == name] for name in ("sft", "dpo", "sft_on_chosen"))
    for system in (sft, dpo, control):
        assert sorted(system["seed"]) == [0, 1, 2] and (system["n"] == 400).all()
    assert sft["rate"].between(0.50, 0.75).all()
    assert (dpo["rate"] <= 0.05).all() and (dpo["p_from_sft"] < 1e-6).all()
    assert (dpo["omission_rate"] <= 0.02).all() and (dpo["answer_rate"] == 1).all()
    assert (control["p_to_dpo"] < 0.01).all()

"""The strategies for the reference: the same loss from three, another one from the fourth."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_dpo import reference_run

from hallulib.dpo.strategies import adapter_copy, compare_strategies
from hallulib.dpo.train import train_dpo
from hallulib.models import load_policy

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    settings = {"dpo.guardrail_notes": 0, "dpo.learning_rate": 1e-2}
    recipe, run = reference_run(tmp_path_factory.mktemp("strategies") / "run", settings)
    train_dpo(recipe, run)
    return compare_strategies(recipe, run, count=4)


def test_the_right_references_give_ln_2_at_the_start_and_one_loss_afterwards(table):
    right = table.drop("disabled adapter")
    assert len(right) == 3
    assert right["start_loss"].to_list() == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert right["trained_loss"].to_list() == pytest.approx([right["trained_loss"].iloc[0]] * 3)
    assert right["trained_loss"].iloc[0] < math.log(2) - 0.01


def test_the_base_model_is_another_reference_once_there_is_an_sft_adapter(table):
    wrong = table.loc["disabled adapter"]
    assert abs(wrong["start_loss"] - math.log(2)) > 1e-3
    assert wrong["trained_loss"] != pytest.approx(table.loc["cached", "trained_loss"], abs=1e-4)


def test_two_models_hold_everything_twice_a_copy_the_adapter_and_the_cache_nothing(table):
    extra = table["extra_bytes"]
    assert extra["cached"] == extra["disabled adapter"] == 0 < extra["adapter copy"]
    assert extra["dual model"] > extra["adapter copy"]
    assert table["passes"].to_dict()["cached"] == 0


def test_the_policy_is_as_before_when_the_copy_is_gone(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with adapter_copy(policy, recipe, run) as model:
        assert model.active_adapter == "reference"
    after = dict(policy.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert policy.active_adapter == "default"

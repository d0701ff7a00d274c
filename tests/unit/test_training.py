"""The training loop itself: a loss that is no number, steps that took far too long, signals."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import copy_sft_run, make_recipe

from hallulib import training
from hallulib.errors import GateFailed
from hallulib.sft import train_sft

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_at_the_first_loss_that_is_no_number(tmp_path, monkeypatch, value):
    recipe = make_recipe({"sft.save_steps": 4, "sft.eval_steps": 4})
    run = copy_sft_run(tmp_path / "run", make_recipe())
    original, calls = torch.Tensor.backward, []

    def backward(self, *arguments, **named):
        calls.append(self)
        if len(calls) == 3:  # the probe was the first; the gradients of step 2 break
            self = self * value
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(GateFailed, match="loss of step 3 is nan"):
        train_sft(recipe, run)


def test_a_step_that_takes_many_times_the_usual_is_reported_once(capsys):
    pace = []
    for step, seconds in enumerate([1, 1, 1, 1, 200, 1], start=1):
        training.report_slow_step(step, seconds, pace)
    assert pace == [1, 1, 1, 1, 1]
    assert capsys.readouterr().out.count("step 5 took 200 s, the usual is 1.0 s: did the") == 1

"""Running out of memory, a loss that is no number, and steps that took far too long."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_model import copy_sft_run, make_recipe

from hallulib import meter, watch
from hallulib.errors import GateFailed, HallulibError
from hallulib.sft import SftTrainer, train_sft
from hallulib.watch import (
    SlowStepWatch,
    check_loss_is_a_number,
    explain_out_of_memory,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_of_memory_says_what_to_lower(error):
    with pytest.raises(HallulibError, match=r"batch of dpo \(rows of up to 900 tokens") as caught:
        with explain_out_of_memory("dpo", 900):
            raise error
    assert "dpo.batch_size and raise dpo.gradient_accumulation" in str(caught.value)
    assert "GiB were in use" in str(caught.value) and "predicted" not in str(caught.value)
    assert "GPU 0" not in str(caught.value)


def test_the_prediction_and_its_advice_stand_beside_what_was_in_use(monkeypatch):
    monkeypatch.setitem(meter.EXPECTED, "sft", meter.Expectation(3 * 2**30, "Set it smaller."))
    said = r"3\.00 GiB were predicted\)[\s\S]*Set it smaller\. Or: "
    with pytest.raises(HallulibError, match=said):
        with explain_out_of_memory("sft", 10):
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_real_allocation_that_fails_is_understood():
    with pytest.raises(HallulibError), explain_out_of_memory("sft", 10):
        torch.empty(2**55)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("dpo", 10):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_finite_loss_passes_and_any_other_names_its_step():
    check_loss_is_a_number(torch.tensor(3.0), 0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(GateFailed, match="loss of step 8"):
            check_loss_is_a_number(torch.tensor(value), 7)


def test_training_stops_at_the_first_loss_that_is_no_number(tmp_path, monkeypatch):
    recipe = make_recipe({"sft.learning_rate": 1e-3})
    run = copy_sft_run(tmp_path / "run", make_recipe())
    original, calls = SftTrainer.measure, []

    def measure(self, model, batch):
        loss, sums = original(self, model, batch)
        calls.append(model.training)
        return (loss * float("nan") if sum(calls) == 4 else loss), sums

    monkeypatch.setattr(SftTrainer, "measure", measure)
    with pytest.raises(GateFailed, match="loss of step 3 is nan"):  # the probe was the first
        train_sft(recipe, run)


def test_a_step_that_takes_many_times_the_usual_is_reported_once(monkeypatch, capsys):
    clock = iter([0, 1, 1, 2, 2, 3, 3, 4, 4, 204, 204, 205])
    monkeypatch.setattr(watch, "time", SimpleNamespace(time=lambda: next(clock)))
    callback = SlowStepWatch()
    for step in range(1, 7):
        callback.on_step_begin(None, None, None)
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert callback.outliers == [(5, 200)]
    assert capsys.readouterr().out.count("did the computer sleep") == 1

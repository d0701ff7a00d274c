"""What stages measure beside what was predicted for them."""

from __future__ import annotations

import json

import pytest
from tiny_model import make_recipe, start_run

from hallulib.errors import HallulibError
from hallulib.memory import budget, check_fits, compare_with_measured

pytestmark = pytest.mark.unit

GPU = {"device": "cuda (a card)", "peak_memory_bytes": 1000, "wall_seconds": 1.0}


def record_sft(run, recipe, **measured):
    """Write down an SFT that took this."""
    run.path("sft/adapter").mkdir(parents=True, exist_ok=True)
    run.path("sft/metrics.jsonl").write_text("")
    run.record("sft", recipe, GPU | measured, {})


def test_a_prediction_is_written_for_its_stage_and_held_against_what_a_gpu_measured(tmp_path):
    recipe = make_recipe()
    run = start_run(tmp_path, recipe)
    predicted = check_fits(recipe, run, "sft")
    written = json.loads(run.path("budget/sft.json").read_text("utf-8"))
    sizes = {name: getattr(predicted, name) for name in ("needed", "allocated", "reserved")}
    assert sizes.items() <= written.items() and "checkpointing" in written["advice"]
    assert compare_with_measured(run).empty  # it has not run yet
    record_sft(run, recipe)
    (row,) = compare_with_measured(run).to_dict("records")
    assert (row["stage"], row["predicted"], row["measured"]) == ("sft", predicted.allocated, 1000)
    assert row["error"] == pytest.approx(predicted.allocated / 1000 - 1)


def test_on_a_cpu_nothing_is_called_measured_but_what_the_process_grew_to(tmp_path):
    recipe = make_recipe()
    run = start_run(tmp_path, recipe)
    check_fits(recipe, run, "sft")
    record_sft(run, recipe, device="cpu")
    (row,) = compare_with_measured(run).to_dict("records")
    assert row["resident"] == 1000 and row["measured"] != row["measured"]


def test_a_prediction_for_other_settings_is_not_compared(tmp_path):
    recipe = make_recipe()
    run = start_run(tmp_path, recipe)
    check_fits(recipe, run, "sft")
    record_sft(run, make_recipe({"sft.batch_size": 2}))
    assert compare_with_measured(run).empty


def test_a_stage_that_cannot_fit_is_refused_and_force_starts_it(tmp_path, monkeypatch):
    recipe = make_recipe()
    run = start_run(tmp_path / "run", recipe)
    fitting = check_fits(recipe, run, "sft")
    assert fitting.strategy == "sft" and fitting.terms["cuda_context"] == 0
    monkeypatch.setattr(budget, "read_free_bytes", lambda recipe: 1000)
    with pytest.raises(HallulibError, match="sft would need .* GiB are free") as refusal:
        check_fits(recipe, run, "sft")
    assert "sft.batch_size" in str(refusal.value) or "checkpointing" in str(refusal.value)
    assert check_fits(recipe, run, "sft", force=True) == fitting


def test_a_stage_that_cannot_be_predicted_starts_only_by_force(tmp_path, monkeypatch):
    recipe = make_recipe()
    run = start_run(tmp_path / "run", recipe)
    lengths = {"tokens": 999, "completion": 9}
    monkeypatch.setattr(budget, "read_lengths", lambda *_: (lengths, ""))
    with pytest.raises(HallulibError, match="999 tokens are more than the 512 positions"):
        check_fits(recipe, run, "sft")
    assert check_fits(recipe, run, "sft", force=True) is None

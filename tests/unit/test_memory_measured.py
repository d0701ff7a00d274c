"""What stages measure beside what was predicted for them: real training on the CPU."""

from __future__ import annotations

import pytest
from hallulib.watch import TensorPeak
from tiny_dpo import build_trainer, reference_run
from tiny_model import make_recipe, start_run

from hallulib import meter
from hallulib.dpo import cache_reference, train_dpo
from hallulib.dpo.batching import collate_pairs
from hallulib.memory import budget, check_fits, compare_with_measured, preflight
from hallulib.meter import Expectation, measure, note_tensor_peak, take_comparison
from hallulib.models import load_policy
from hallulib.sft import train_sft

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def nothing_expected(monkeypatch):
    monkeypatch.setattr(meter, "EXPECTED", {})
    monkeypatch.setattr(preflight, "EXPECTED", meter.EXPECTED)


def expect_rows(monkeypatch, sequence, completion):
    found = {"sequence": sequence, "completion": completion, "source": "a test"}
    monkeypatch.setattr(preflight, "read_longest", lambda recipe, audit: found)
    monkeypatch.setattr(preflight, "json", FakeJson)


class FakeJson:
    """The audit of these small runs holds no token counts."""

    loads = staticmethod(lambda text: {})


def test_training_takes_what_was_predicted_and_the_manifest_says_so(tmp_path, monkeypatch):
    recipe, run = reference_run(tmp_path / "run")
    trainer = build_trainer(recipe, run, tmp_path / "probe")
    longest = max((row["pair"] for row in trainer.train_dataset), key=lambda pair: pair.length)
    completion = max(len(longest.chosen_ids), len(longest.rejected_ids))
    expect_rows(monkeypatch, longest.length, completion)
    check_fits(recipe, run, "dpo")
    train_dpo(recipe, run)
    memory = run.manifest["stages"]["dpo"]["memory"]
    # Every pair is predicted as long as the longest, and weights are most of a model so small.
    assert -0.02 < memory["error"] < 0.25
    (row,) = [row for row in compare_with_measured(run) if row["stage"] == "dpo"]
    assert row["predicted"] == memory["predicted_bytes"] > row["measured"] * 0.98
    assert row["strategy"] == budget.MEASURED_STAGES["dpo"]


def test_the_reference_pass_and_sft_note_their_tensors_too(tmp_path, monkeypatch):
    recipe = make_recipe()
    run = start_run(tmp_path / "sft", recipe)
    expect_rows(monkeypatch, 120, 40)
    check_fits(recipe, run, "sft")
    train_sft(recipe, run)
    assert run.manifest["stages"]["sft"]["memory"]["measured_bytes"] > 100_000
    recipe, run = reference_run(tmp_path / "run")
    run.forget("reference")
    for rows in run.path("reference").rglob("rows.sqlite"):
        rows.unlink()
    check_fits(recipe, run, "reference")
    cache_reference(recipe, run)
    assert run.manifest["stages"]["reference"]["memory"]["measured_bytes"] > 100_000


def test_only_batches_larger_than_all_before_and_two_like_them_are_followed(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    trainer = build_trainer(recipe, run, tmp_path / "probe")
    pairs = sorted((row["pair"] for row in trainer.train_dataset), key=lambda pair: pair.length)
    policy, peak, seen = load_policy(recipe, run.require("sft/adapter"), False), TensorPeak(), []
    for pair in (pairs[0], *[pairs[-1]] * 4, pairs[0]):
        with measure("a pass") as found, peak.watch(collate_pairs([pair], 0), policy):
            pass
        seen.append(found.peak_tensor_bytes)
    assert seen[1] == seen[2] == seen[3] > seen[0] > 0 and seen[4:] == [0, 0]


def test_nothing_is_compared_without_a_prediction_or_a_measurement(monkeypatch):
    with measure("sft") as found:
        note_tensor_peak(500)
        note_tensor_peak(400)
    assert found.peak_tensor_bytes == 500 and take_comparison("sft", found) == {}
    expected = Expectation(needed=700, advice="", allocated=600, reserved=650)
    meter.EXPECTED["sft"] = expected
    memory = take_comparison("sft", found)
    assert memory == {"predicted_bytes": 600, "measured_bytes": 500, "error": 600 / 500 - 1}
    assert take_comparison("sft", found) == {}  # it was for one run of the stage
    found.peak_mps_bytes, meter.EXPECTED["sft"] = 580, expected
    assert take_comparison("sft", found)["measured_bytes"] == 580
    found.peak_cuda_bytes, found.peak_cuda_reserved_bytes = 590, 660
    meter.EXPECTED["sft"] = expected
    on_gpu = take_comparison("sft", found)
    assert (on_gpu["measured_bytes"], on_gpu["measured_reserved_bytes"]) == (590, 660)
    assert on_gpu["predicted_reserved_bytes"] == 650
    meter.EXPECTED["sft"] = expected
    with measure("empty") as found:
        pass
    assert take_comparison("sft", found) == {}

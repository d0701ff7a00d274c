"""The guardrail and early stopping: what the policy writes in training, and the best kept."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_dpo import reference_run, weights

from hallulib.dpo.guardrail import Guardrail, count_since_best, rate_summaries, score_checks
from hallulib.dpo.train import train_dpo
from hallulib.files import read_jsonl

pytestmark = pytest.mark.unit


def test_the_guardrail_reports_before_the_first_step_every_few_and_after_the_last(tmp_path):
    recipe, run = reference_run(tmp_path / "run", {"dpo.max_steps": 4})
    result = train_dpo(recipe, run)
    rows = [r for r in read_jsonl(run.path("dpo/metrics.jsonl")) if "guardrail/answer_rate" in r]
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert 0 <= result.metrics["guardrail/hallucination_rate"] <= 1


@pytest.mark.parametrize(
    ("seen", "best", "stopped"),
    [([0.6, 0.2, 0.4, 0.3, 0.0], 1, 3), ([0.1, 0.2, 0.3], 0, 2)],  # the second gets worse only
)
def test_training_stops_when_the_guardrail_sees_no_new_best_and_keeps_the_best(
    tmp_path, monkeypatch, seen, best, stopped
):
    rates, kept = iter(seen), []

    def look(self):
        lora = {n: p for n, p in self.policy.named_parameters() if "lora" in n}
        kept.append({name: value.detach().clone() for name, value in lora.items()})
        return {
            "guardrail/answer_rate": 1.0,
            "guardrail/hallucination_rate": next(rates),
            "guardrail/omission_rate": 0.0,
        }

    monkeypatch.setattr(Guardrail, "look", look)
    settings = {"dpo.guardrail_patience": 2, "dpo.guardrail_steps": 1}
    recipe, run = reference_run(tmp_path / "run", settings)
    result = train_dpo(recipe, run)
    assert (result.notes["steps"], result.notes["kept_step"]) == (stopped, best)
    assert result.metrics["guardrail/hallucination_rate"] == seen[best]
    saved = weights(run)
    for name, value in kept[best].items():
        assert torch.equal(saved[name.replace(".default.", ".")], value)


def test_a_guardrail_score_is_what_is_invented_plus_what_is_left_out():
    def scores(*pairs):
        names = ("guardrail/hallucination_rate", "guardrail/omission_rate")
        rows = [{"guardrail/answer_rate": 1.0} | dict(zip(names, p, strict=False)) for p in pairs]
        return score_checks([*rows, {"eval_loss": 0.3}])

    assert scores((0.6, 0.0), (0.0, 0.2)) == [0.6, 0.2]
    assert scores(()) == [2.0]  # answered nothing
    assert count_since_best(scores((0.6, 0.0), (0.1, 0.0), (0.0, 0.2))) == 1


def test_the_last_of_equally_good_scores_is_the_best():
    assert count_since_best([0.6, 0.1, 0.1]) == 0
    assert count_since_best([0.6, 0.1, 0.1, 0.2]) == 1
    assert count_since_best([]) == 0


def test_guardrail_rates_are_those_counted_by_hand():
    from hallulib.clinic.notes import make_notes
    from hallulib.clinic.summaries import write_summary

    notes = make_notes(4, seed=3)
    rows = [{"context": n.text, "facts": json.dumps(n.facts)} for n in notes]
    right = [write_summary(note.facts) for note in notes]
    rates = rate_summaries(rows, right)
    assert rates["guardrail/hallucination_rate"] == 0 and rates["guardrail/omission_rate"] == 0
    # The second patient's summary for the first note is wrong; an empty one answers nothing.
    mixed = rate_summaries(rows, [right[1], "", right[2], right[3]])
    assert mixed["guardrail/answer_rate"] == 0.75
    assert mixed["guardrail/hallucination_rate"] == pytest.approx(1 / 3)
    # The empty one leaves all out, of four notes that state equally much; the others nothing.
    assert mixed["guardrail/omission_rate"] == pytest.approx(0.25)


def test_notes_without_facts_are_judged_by_the_rules():
    rows = [{"context": "He takes aspirin 75 mg.", "facts": ""}]
    wrong = rate_summaries(rows, ["He takes warfarin 3 mg."])
    assert wrong["guardrail/hallucination_rate"] == 1
    assert "guardrail/omission_rate" not in wrong

"""The guardrail and early stopping: what the policy writes in training, and the best kept."""

import json

import pytest
import torch
from tiny_dpo import reference_run, weights

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_summary
from hallulib.dpo.guardrail import Guardrail, count_since_best, rate_summaries, score_checks
from hallulib.dpo.train import train_dpo
from hallulib.files import read_jsonl

pytestmark = pytest.mark.unit

RATES = ("guardrail/hallucination_rate", "guardrail/omission_rate")


def test_the_guardrail_reports_before_the_first_step_every_few_and_after_the_last(tmp_path):
    recipe, run = reference_run(tmp_path / "run", {"dpo.max_steps": 4})
    result = train_dpo(recipe, run)
    rows = [r for r in read_jsonl(run.path("dpo/metrics.jsonl")) if "guardrail/answer_rate" in r]
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert 0 <= result.notes["metrics"]["guardrail/hallucination_rate"] <= 1


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
        return {"guardrail/answer_rate": 1.0, RATES[0]: next(rates), RATES[1]: 0.0}

    monkeypatch.setattr(Guardrail, "look", look)
    settings = {"dpo.guardrail_patience": 2, "dpo.guardrail_steps": 1}
    recipe, run = reference_run(tmp_path / "run", settings)
    notes = train_dpo(recipe, run).notes
    assert (notes["steps"], notes["kept_step"]) == (stopped, best)
    assert notes["metrics"][RATES[0]] == seen[best]
    saved = weights(run)
    for name, value in kept[best].items():
        assert torch.equal(saved[name.replace(".default.", ".")], value)


def test_a_guardrail_score_is_what_is_invented_plus_what_is_left_out():
    def scores(*pairs):
        rows = [{"guardrail/answer_rate": 1.0} | dict(zip(RATES, p, strict=False)) for p in pairs]
        return score_checks([*rows, {"eval_loss": 0.3}])

    assert scores((0.6, 0.0), (0.0, 0.2)) == [0.6, 0.2]
    assert scores(()) == [2.0]  # answered nothing
    assert count_since_best(scores((0.6, 0.0), (0.1, 0.0), (0.0, 0.2))) == 1
    # The last of equally good scores is the best.
    cases = ([0.6, 0.1, 0.1], [0.6, 0.1, 0.1, 0.2], [])
    assert [count_since_best(case) for case in cases] == [0, 1, 0]


def test_guardrail_rates_are_those_counted_by_hand():
    notes = make_notes(4, seed=3)
    rows = [{"context": n.text, "facts": json.dumps(n.facts)} for n in notes]
    right = [write_summary(note.facts) for note in notes]
    rates = rate_summaries(rows, right)
    assert [rates[name] for name in RATES] == [0, 0]
    # The second patient's summary for the first note is wrong; an empty one answers nothing.
    mixed = rate_summaries(rows, [right[1], "", right[2], right[3]])
    assert mixed["guardrail/answer_rate"] == 0.75
    # The empty one leaves all out, of four notes that state equally much; the others nothing.
    assert [mixed[name] for name in RATES] == pytest.approx([1 / 3, 0.25])
    # Notes without facts are judged by the rules.
    unknown = [{"context": "He takes aspirin 75 mg.", "facts": ""}]
    wrong = rate_summaries(unknown, ["He takes warfarin 3 mg."])
    assert wrong[RATES[0]] == 1 and RATES[1] not in wrong

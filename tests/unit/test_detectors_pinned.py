"""What the rules say and what the edits change: verdicts and pairs stay as they were published."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_reference
from hallulib.detectors import NoisyJudge, Source, get_detector
from hallulib.detectors.edits import choose_edits

pytestmark = pytest.mark.unit
NOTES = make_notes(300, seed=7, missing_rate=0.22)
REFERENCES = [(note.id, write_reference(note, 7, 0.72), note.text) for note in NOTES]


def hash_values(values: object) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def edits():
    return choose_edits(REFERENCES, seed=0, count=lambda text: len(text.split()))


def judge_all(judge, edits) -> list:
    """Every verdict on each reference and on the same with its deliberate error."""
    texts = [(note, text) for _, text, note in REFERENCES]
    texts += [(note, edits[name].apply(text)) for name, text, note in REFERENCES if name in edits]
    return [
        statement.to_dict()
        for note, text in texts
        for statement in judge.judge(Source(note), text).statements
    ]


def test_the_edits_of_a_seed_are_the_same_edits(edits):
    values = [[name, e.kind, e.start, e.end, e.before, e.after] for name, e in edits.items()]
    assert (len(values), hash_values(values)) == (300, "f9817e418140908f")


def test_the_rules_give_the_same_verdicts(edits):
    values = judge_all(get_detector("entities"), edits)
    assert (len(values), hash_values(values)) == (9123, "82d310eaedb5b68c")


def test_the_noisy_judge_errs_on_the_same_statements(edits):
    values = judge_all(NoisyJudge(get_detector("entities"), 0.05, 0.1, seed=3), edits)
    assert (len(values), hash_values(values)) == (9123, "a034ce57f70622b0")

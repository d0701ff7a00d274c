"""The entailment detector on a real checkpoint that was trained and written to disk here."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_nli import ORDER, WORDS, write_nli_model

from hallulib.detectors import Source, get_detector
from hallulib.detectors.nli import read_label_order
from hallulib.errors import HallulibError

pytestmark = pytest.mark.unit
LONG_NOTE = "Fever. " + "Cough. No rash. " * 12 + "No asthma. Aspirin."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_nli_model(tmp_path_factory.mktemp("nli") / "tiny-nli")


@pytest.fixture(scope="module")
def detector(folder):
    return get_detector("nli", name_or_path=str(folder))


def judge(detector, note: str, summary: str):
    return detector.judge(Source(note.lower()), summary.lower())


@pytest.mark.parametrize("word", WORDS)
def test_each_sentence_gets_the_verdict_of_the_model(detector, word):
    other = WORDS[WORDS.index(word) - 1]
    verdicts = [
        judge(detector, note, word).statements[0].verdict
        for note in (f"{word}. {other}.", f"no {word}. {other}.", f"{other}.")
    ]
    assert verdicts == ["supported", "contradicted", "not_in_note"]


def test_a_long_note_is_read_in_parts_and_the_evidence_is_the_sentence_that_says_it(detector):
    judged = judge(detector, LONG_NOTE, "Aspirin. Fever. Asthma. Stroke.")
    assert [(s.verdict, s.evidence) for s in judged.statements] == [
        ("supported", "aspirin"), ("supported", "fever"), ("contradicted", "no asthma"),
        ("not_in_note", ""),
    ]  # fmt: skip
    for statement in judged.statements:
        for start, end in statement.evidence_spans:
            assert LONG_NOTE.lower()[start:end] == statement.evidence


def test_no_part_of_a_note_is_longer_than_the_model_reads_and_none_is_lost(detector):
    unbroken = " ".join(WORDS[place * place % 5] for place in range(30))
    sentences, read = [f"no {WORDS[place % 6]}" for place in range(12)], []
    for note in (unbroken, LONG_NOTE.lower() + " " + unbroken, ". ".join(sentences)):
        read.clear()
        hook = detector.model.register_forward_pre_hook(
            lambda _, args, inputs: read.append(inputs["input_ids"]), with_kwargs=True
        )
        judge(detector, note, "Aspirin.")
        hook.remove()
        assert max(batch.shape[1] for batch in read) <= detector.longest
        rows = [row for batch in read for row in detector.tokenizer.batch_decode(batch)]
        parts = [row.split("[CLS]")[1].split("[SEP]")[0].strip() for row in rows]
        if note == unbroken:
            assert " ".join(parts) == unbroken
        assert all(any(s.strip(" .") in part for part in parts) for s in note.split(".")[:-1])


def test_the_score_is_one_minus_the_probability_of_entailment(detector):
    supported, invented = judge(detector, "Fever. Cough.", "Fever. Stroke.").statements
    assert supported.score < 0.5 < invented.score
    assert detector.name == "nli:tiny-nli"  # the checkpoint, and no path of a machine


def test_what_cannot_be_judged_is_unparsed_and_never_clean(detector, folder):
    broken = get_detector("nli", name_or_path=str(folder))
    torch.nn.init.constant_(broken.model.classifier.bias, float("nan"))
    assert judge(broken, "Fever.", "Fever.").hallucinated is None
    for note, summary in [("Fever.", "cough " * 9), ("", "Fever."), ("Fever.", "...")]:
        judged = judge(detector, note, summary)
        assert judged.hallucinated is None and judged.score is None
    mixed = judge(detector, "Fever.", "Fever. " + "cough " * 9)
    assert [s.verdict for s in mixed.statements] == ["supported", "unparsed"]
    assert (mixed.unparsed, mixed.hallucinated) == (1, False)


@pytest.mark.parametrize(
    ("labels", "order"),
    [(ORDER, {"support": 1, "contradiction": 2}),
     (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], {"contradiction": 0, "support": 2}),
     (["not_entailment", "entailment"], {"support": 1}),
     (["Refutes", "Supports", "Not enough info"], {"contradiction": 0, "support": 1})],
)  # fmt: skip
def test_the_label_order_is_read_from_the_config(labels, order):
    assert read_label_order(dict(enumerate(labels))) == order


@pytest.mark.parametrize(
    "labels", [["LABEL_0", "LABEL_1"], ["entailment", "something"], ["entailment", "entailed"]]
)
def test_labels_that_do_not_say_what_they_mean_are_refused(labels):
    with pytest.raises(HallulibError, match="id2label"):
        read_label_order(dict(enumerate(labels)))


def test_a_checkpoint_with_the_other_order_gives_the_other_verdicts(folder, tmp_path):
    """The same weights under swapped names: only the config says what an output means."""
    swapped = shutil.copytree(folder, tmp_path / "swapped")
    config = json.loads((swapped / "config.json").read_text())
    config["id2label"] = {"0": "neutral", "1": "contradiction", "2": "entailment"}
    config["label2id"] = {"neutral": 0, "contradiction": 1, "entailment": 2}
    (swapped / "config.json").write_text(json.dumps(config))
    other = get_detector("nli", name_or_path=str(swapped))
    assert judge(other, "Fever. Cough.", "Fever.").statements[0].verdict == "contradicted"


def test_what_cannot_be_loaded_says_what_to_set(tmp_path):
    for name in ("", str(tmp_path)):
        with pytest.raises(HallulibError, match="evaluation.nli_model"):
            get_detector("nli", name_or_path=name)

"""The detectors: the rules of the text-only judge, the exact one, and noise."""

from __future__ import annotations

import csv

import pytest
from data_factory import REAL

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_reference, write_summary
from hallulib.detectors import (
    Judgement,
    NoisyJudge,
    Source,
    StatementVerdict,
    find_sentences,
    get_detector,
    measure_judge,
)
from hallulib.errors import DataError, RecipeError

pytestmark = pytest.mark.unit
RULES, EXACT = get_detector("entities"), get_detector("facts")
NOTE = (
    "Mrs. Hill is a 58 y/o woman with pain in the left knee for three days. She takes metformin "
    "500 mg BID. Denies fever, chills or rash. BP 142/88. Her father had a stroke."
)
SUPPORTED = """
58-year-old woman with pain in the left knee for 3 days.
Fifty-eight year old female, left knee pain.
Takes metformin 500mg twice daily.
Denies fever and chills.
No rash.
Blood pressure 142/88.
Family history: stroke in father.
Stroke 142/88.
""".strip().splitlines()  # the last: in the next sentence, too near for this rule to see


def judge(summary: str, note: str = NOTE) -> list[StatementVerdict]:
    return RULES.judge(Source(note), summary).statements


@pytest.mark.parametrize("summary", SUPPORTED)
def test_what_the_note_says_in_other_words_is_supported(summary):
    assert [s.verdict for s in judge(summary)] == ["supported"] * len(judge(summary))


@pytest.mark.parametrize(
    ("summary", "verdict", "error_type"),
    [
        ("Takes metformin 850 mg.", "not_in_note", "detail"),
        ("Takes lisinopril.", "not_in_note", "fabrication"),
        ("Pain in the right knee.", "contradicted", "detail"),
        ("58-year-old man.", "contradicted", "detail"),
        ("Has fever.", "contradicted", "negation"),
        ("Denies pain in the left knee.", "contradicted", "negation"),
        ("Pain for 58 days.", "not_in_note", "detail"),
        ("Metformin for three days.", "contradicted", "detail"),
        ("Stroke three days ago.", "contradicted", "detail"),  # the number is far from its word
        ("Allergies: none known.", "not_in_note", "fabrication"),
        ("Follow-up in two weeks.", "not_in_note", "detail"),
    ],
)
def test_each_rule_names_its_error(summary, verdict, error_type):
    (statement,) = judge(summary)
    assert (statement.verdict, statement.error_type) == (verdict, error_type)


def test_clauses_are_judged_apart_each_in_its_place_and_with_evidence():
    summary = "Denies fever and vomiting. Takes metformin 500 mg, lisinopril 10 mg."
    found = judge(summary)
    assert all(summary[s.start : s.end] == s.text for s in found)
    assert [s.verdict for s in found] == ["supported", "not_in_note"] * 2
    assert "vomit" in found[1].evidence
    assert found[2].evidence == "She takes metformin 500 mg BID"
    # A phrase that means one word is marked to its end.
    said = judge("He comes in today for follow-up. Has shortness of breath.", "Nothing.")
    texts = ["He comes in today for follow-up", "Has shortness of breath"]
    assert [s.text for s in said] == texts


def test_each_statement_names_what_it_is_about():
    kinds = {
        "58-year-old woman.": "age", "Metformin 500 mg.": "dose", "BP 142/88.": "number",
        "No rash.": "negated finding", "Asthma.": "condition", "Left knee.": "side",
        "Pain.": "finding", "Metformin.": "drug",
    }  # fmt: skip
    assert [s.kind for s in judge(" ".join(kinds))] == list(kinds.values())


def test_a_missing_drug_or_condition_is_not_forgiven_as_a_paraphrase():
    note = "The patient was started on oral treatment because of the infection last Tuesday morning"
    kept = note.replace("morning", "evening")
    (forgiven,) = judge(kept, note)
    assert forgiven.verdict == "supported"
    for word in ("vancomycin", "osteomyelitis", "Staphylococcus", "laparoscopy"):
        (statement,) = judge(kept.replace("evening", word), note)
        assert (statement.verdict, statement.error_type) == ("not_in_note", "fabrication")
        assert statement.evidence == f"not in the note: {word.lower()}"
        assert statement.score > forgiven.score > 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [("drug", "metformin lisinopril atorvastatin ceftriaxone omeprazole rituximab furosemide"),
     ("condition", "arthritis leukemia osteoporosis neuropathy hypertension hematuria"),
     ("organism", "streptococcus salmonella legionella trichomonas adenovirus"),
     ("procedure", "appendectomy biopsy colonoscopy echocardiogram angioplasty"),
     ("finding", "diagnosis prognosis patella umbrella program patient aroma daily")],
)  # fmt: skip
def test_terms_are_known_by_list_or_by_ending(kind, words):
    assert {judge(word, "Nothing.")[0].kind for word in words.split()} == {kind}


@pytest.mark.parametrize("detector", [RULES, EXACT], ids=lambda detector: detector.name)
def test_evidence_spans_are_places_of_the_note(detector):
    note = make_notes(1, seed=3)[0]
    found = detector.judge(Source(note.text, note.facts), write_summary(note.facts)).statements
    places = [(note.text[a:b], s.evidence) for s in found for a, b in s.evidence_spans]
    assert len(places) >= len(found) / 2
    for place, evidence in places:
        assert place == evidence if detector is RULES else place.lower() in evidence.lower()


def test_sentences_end_at_full_stops_and_lines_and_not_inside_numbers_or_after_titles():
    text = "Mr. Hill takes 2.5 mg. BP 120/80; no rash?\n ... Well! "
    found = ["Mr. Hill takes 2.5 mg", "BP 120/80", "no rash", "Well"]
    assert [text[a:b] for a, b in find_sentences(text)] == found


def test_the_score_of_a_summary_ranks_and_is_none_where_nothing_was_read():
    texts = ("Takes metformin.", "Takes lisinopril.", "Takes lisinopril. No rash. Aspirin.")
    clean, one, two = (RULES.judge(Source(NOTE), text).score for text in texts)
    assert clean == 0 < one < two < 1
    made = [StatementVerdict(t, 0, 1, "k", v) for t, v in [("a", "supported"), ("b", "unparsed")]]
    assert Judgement(made, [], "yes or no only").score == 0
    assert Judgement(made[1:], [], "nothing read").score is None


def test_a_question_of_a_dialogue_neither_states_nor_denies():
    dialogue = "Doctor: Any fever?\nPatient: No.\nDoctor: Any headache?\nPatient: Yes."
    assert [s.verdict for s in judge("No fever. Headache.", dialogue)] == ["supported"] * 2


def test_the_rules_never_look_at_the_facts():
    note = make_notes(1, seed=3)[0]
    summary, lies = write_summary(note.facts), {kind: ["x"] for kind in note.facts}
    assert RULES.judge(Source(note.text, lies), summary).statements == judge(summary, note.text)


@pytest.mark.parametrize("summary", ["", "   ", ".", "...!?", "\n\n"])
def test_an_empty_summary_is_unknown_and_never_clean(summary):
    for detector in (RULES, EXACT):
        judged = detector.judge(Source(NOTE, {"age": ["58"]}), summary)
        assert (judged.hallucinated, judged.score, judged.answered) == (None, None, False)


def test_units_belong_to_the_number_they_touch_and_stems_meet_across_endings():
    note = "BP 168/104, HR 125, weight 70kg, 25%, 2.50 mg. Allergies, headaches."
    said = "Pressure 168/104. Heart rate 125. 70 kg. 25 percent. 2.5 mg. Allergy, headache."
    assert {s.verdict for s in judge(said, note)} == {"supported"}
    for wrong in ("104 kg.", "125 mg.", "2.5 percent.", "70%."):
        assert [s.verdict for s in judge(wrong, note)] == ["not_in_note"]


def test_the_exact_detector_sees_facts_omissions_and_unreadable_sentences():
    note = make_notes(1, seed=3)[0]
    source = Source(note.text, note.facts)
    clean = EXACT.judge(source, write_summary(note.facts))
    assert (clean.hallucinated, clean.omissions, clean.unparsed) == (False, [], 0)
    assert clean.stated == len(note.facts)
    broken = EXACT.judge(source, "Takes moonlight 5 mg. The sky is blue.")
    assert (broken.errors, broken.unparsed, broken.hallucinated) == (1, 1, True)
    assert len(broken.omissions) == len(note.facts) - 1
    assert EXACT.judge(source, "The sky is blue.").hallucinated is None
    with pytest.raises(DataError, match="fact table"):
        EXACT.judge(Source(NOTE), "58-year-old woman.")


def test_an_unknown_detector_is_refused_by_name():
    with pytest.raises(RecipeError, match="'nonsense'\n.*facts, entities, nli"):
        get_detector("nonsense")


def make_rows(count: int) -> list[tuple[Source, str]]:
    return [
        (Source(n.text, n.facts | {"distractors": n.distractors}), write_reference(n, 1, 0.85))
        for n in make_notes(count, seed=5, missing_rate=0.3)
    ]


def test_the_rules_find_most_inventions_of_the_clinic():
    quality = measure_judge(RULES, make_rows(150), EXACT)
    assert quality["n"] == quality["tp"] + quality["fp"] + quality["tn"] + quality["fn"]
    assert quality["sensitivity"]["low"] > 0.9 and quality["specificity"]["low"] > 0.9
    assert quality["fp"] + quality["fn"] > 0  # it has errors of its own, as a real judge has


def test_noise_flips_at_the_stated_rates_and_the_same_way_each_time():
    rows = make_rows(250)
    noisy = NoisyJudge(EXACT, false_positive_rate=0.05, false_negative_rate=0.3, seed=1)
    quality = measure_judge(noisy, rows, EXACT)
    assert quality["specificity"]["low"] <= 0.95 <= quality["specificity"]["high"]
    assert quality["sensitivity"]["low"] <= 0.70 <= quality["sensitivity"]["high"]
    assert measure_judge(noisy, rows[::-1], EXACT) == quality
    other, silent = NoisyJudge(EXACT, 0.05, 0.3, seed=2), NoisyJudge(EXACT, 0, 0)
    assert [noisy.judge(*row) for row in rows] != [other.judge(*row) for row in rows]
    assert silent.judge(*rows[0]).statements == EXACT.judge(*rows[0]).statements
    assert silent.name == "facts+noise"


def test_noise_errs_by_note_and_not_always_on_the_same_words():
    noisy = NoisyJudge(EXACT, 0.5, 0.0, seed=1)
    sources = [Source(f"note {i}", {"allergies": ["none known"]}) for i in range(40)]
    flipped = sum(noisy.judge(source, "Allergies: none known.").errors for source in sources)
    assert 8 < flipped < 32


@pytest.mark.skipif(not REAL.exists(), reason="the real data are not beside the checkout")
def test_every_real_summary_is_judged_with_true_spans():
    with (REAL / "mts-dialog" / "automatic_summaries.csv").open(encoding="utf-8-sig") as file:
        rows = [(row["Dialogue"], row["Automatic Summary"]) for row in csv.DictReader(file)]
    for note, text in rows:
        judged = RULES.judge(Source(note), text)
        assert all(text[s.start : s.end] == s.text for s in judged.statements)
        assert judged.answered == any(c.isalnum() for c in text)

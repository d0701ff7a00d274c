"""Typed errors: every kind changes what the text says, on clinic notes and on other text."""

from __future__ import annotations

import csv
import random
from collections import Counter

import pytest
from data_factory import REAL
from hypothesis import given, settings
from hypothesis import strategies as st

from hallulib.clinic.facts import check
from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_summary
from hallulib.detectors import Source, choose_edits, find_edits, get_detector

pytestmark = pytest.mark.unit
KINDS = set(
    "number dose unit side negation age sex entity_swapped entity_added invented_finding".split()
)
NOTES = make_notes(400, seed=11, missing_rate=0.2)


def edits_of(text: str, note: str = "", seed: int = 0) -> dict[str, list]:
    return find_edits(text, note or text, random.Random(seed))


def afters(text: str, kind: str, note: str = "") -> list[str]:
    return [edit.apply(text) for edit in edits_of(text, note).get(kind, [])]


# --- what each kind does, read by a person ----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "result"),
    [
        ("unit", "Aspirin 75 mg.", "Aspirin 75 mcg."),
        ("unit", "Pain for three weeks.", "Pain for three months."),
        ("side", "Pain in the left knee.", "Pain in the right knee."),
        ("side", "Right-sided numbness.", "Left-sided numbness."),
        ("side", "A left upper lobe nodule.", "A right upper lobe nodule."),
        ("negation", "Denies fever.", "Reports fever."),
        ("negation", "She reports fever.", "She denies fever."),
        ("negation", "No fever.", "Fever."),
        ("negation", "He has no fever.", "He has fever."),
        ("negation", "She reports no fever.", "She reports fever."),  # not "denies no fever"
        ("negation", "No known allergies.", "Known allergies."),
        ("negation", "History without trauma.", "History with trauma."),
        ("sex", "A 40-year-old man with gout.", "A 40-year-old woman with gout."),
        ("sex", "A 7-year-old white female.", "A 7-year-old white male."),
    ],
)
def test_one_word_is_exchanged_for_its_opposite(kind, text, result):
    assert afters(text, kind) == [result]


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("age", "A 40-year-old man.", r"A (?!40)\d\d-year-old man\."),
        ("age", "A man aged 40 years.", r"A man aged (?!40)\d\d years\."),
        ("age", "A 40 y/o man.", r"A (?!40)\d\d y/o man\."),
        ("dose", "Aspirin 75 mg daily.", r"Aspirin (?!75 )[\d.]+ mg daily\."),
        ("dose", "Insulin 2.5 units.", r"Insulin (?!2.5 )[\d.]+ units\."),
        ("number", "Temperature 38.4 today.", r"Temperature (?!38\.4)\d\d\.\d today\."),
        ("number", "BP 120/80.", r"BP (?!120)\d{2,3}/80\."),
        ("number", "Pain for two weeks.", r"Pain for (?!two)\w+ weeks\."),
        ("entity_swapped", "Takes Aspirin.", r"Takes (?!Aspirin)[A-Z]\w+\."),
        ("entity_swapped", "Her mother had cancer.", r"Her (?!mother)\w+ had cancer\."),
        ("entity_added", "History of gout.", r"History of [\w' ]+ and gout\."),
        ("invented_finding", "He is well. He eats. He walks.", r"He is well\. .*(?:eats|walks)\."),
        ("invented_finding", "He is well.", r"He is well\. \w+.*\."),
    ],
)
def test_a_value_is_exchanged_for_another_of_its_kind(kind, text, pattern):
    import re

    found = afters(text, kind)
    if kind == "invented_finding":
        assert found and all(new != text for new in found)
        assert any(re.fullmatch(r"He is well\. \w+.*\.", new) for new in found)
        return
    assert found and all(re.fullmatch(pattern, new) for new in found)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("side", "She left the hospital right away."),
        ("number", "Seen in 2008.\n2. Gout. 3. Asthma."),
        ("age", "Seen 40 years ago."),
        ("unit", "A 40 year old man."),
        ("sex", "Female reproductive history."),
        ("entity_added", "With recurrent headaches."),
    ],
)
def test_what_only_looks_like_a_value_is_left_alone(kind, text):
    assert afters(text, kind) == []


def test_nothing_that_the_note_says_is_put_in():
    note = "Pain in the left knee and the right knee. Takes 20 mg, before 40 mg. Gout, asthma."
    assert afters("Pain in the left knee.", "side", note) == []
    assert not any("40" in text for text in afters("Takes 20 mg.", "dose", note))
    swapped = afters("History of gout.", "entity_swapped", note)
    assert swapped and not any("asthma" in text for text in swapped)
    assert afters("Pain for 2 days.", "unit", "Pain for 2 days, then 2 weeks.") == []


def test_another_name_of_a_stated_thing_is_no_error_and_not_used():
    names = {"heart failure", "congestive heart failure", "chf"}
    drawn = {
        edit.after.lower()
        for seed in range(60)
        for edit in edits_of("History of gout.", "History of gout and CHF.", seed)["entity_swapped"]
    }
    assert len(drawn) > 30 and not drawn & names


def test_a_phrase_is_stated_only_as_whole_words_and_whole_numbers():
    text = "Takes 20 mg."
    for inside in ("Takes 140 mg.", "Takes 40.5 mg.", "Takes 0.40 mg.", "Takes 40mg."):
        assert "Takes 40 mg." in afters(text, "dose", inside)
    assert "Takes 40 mg." not in afters(text, "dose", "Takes 40.")
    assert afters("Pain for 2 days.", "unit", "Pain for 2 days, then 12 WEEKS.")
    assert afters("Pain for 2 days.", "unit", "Pain for 2 days, then 2 WEEKS.") == []


# --- proof on many texts ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(NOTES) - 1), st.integers(0, 1000))
def test_every_edit_makes_a_faithful_summary_wrong_by_the_exact_checker(number, seed):
    note = NOTES[number]
    summary = write_summary(note.facts)
    assert not any(v["verdict"] in ("contradicted", "not_in_note")
                   for v in check(note.facts, summary))  # fmt: skip
    for kind, edits in edits_of(summary, note.text, seed).items():
        for edit in edits:
            verdicts = check(note.facts, edit.apply(summary))
            wrong = [v for v in verdicts if v["verdict"] in ("contradicted", "not_in_note")]
            unread = [v for v in verdicts if v["kind"] == "unparsed"]
            assert wrong or unread, (kind, edit.describe(), summary)
            if kind not in ("negation", "invented_finding"):
                assert wrong, (kind, edit.describe(), summary)


def test_the_clinic_allows_every_kind_and_each_is_used_equally_often():
    texts = [(note.id, write_summary(note.facts), note.text) for note in NOTES]
    edits = choose_edits(texts, seed=0, count=len)
    assert len(edits) == len(NOTES)
    used = Counter(edit.kind for edit in edits.values())
    assert set(used) == KINDS and max(used.values()) - min(used.values()) <= 2


def test_length_does_not_tell_which_side_is_wrong():
    texts = [(note.id, write_summary(note.facts), note.text) for note in NOTES]
    edits = choose_edits(texts, seed=0, count=lambda text: len(text.split()))
    words = [edit.measure_growth(lambda text: len(text.split())) for edit in edits.values()]
    assert abs(sum(words)) <= 20  # of more than 20,000 words
    longer, shorter = (sum(sign * w > 0 for w in words) for sign in (1, -1))
    assert 0.4 < (longer + (len(words) - longer - shorter) / 2) / len(words) < 0.6


def test_of_several_edits_the_one_is_taken_that_evens_out_the_lengths():
    for note in NOTES[:40]:
        text = write_summary(note.facts)
        (edit,) = choose_edits([(note.id, text, note.text)], seed=0, count=len).values()
        others = find_edits(text, note.text, random.Random(f"perturb-0-{note.id}"))[edit.kind]
        growth = abs(edit.measure_growth(len))
        assert growth == min(abs(other.measure_growth(len)) for other in others)


def test_texts_that_could_only_grow_are_left_out_once_the_wrong_sides_are_longer():
    texts = [(str(i), "He sleeps.", "He sleeps.") for i in range(50)]
    edits = choose_edits(texts, seed=0, count=lambda text: len(text.split()))
    grown = sum(edit.measure_growth(lambda text: len(text.split())) for edit in edits.values())
    assert 0 < len(edits) < 10 and grown < 20


def test_an_edit_describes_itself_and_has_a_place_in_the_taxonomy():
    text = "Takes aspirin 75 mg."
    edit = edits_of(text)["dose"][0]
    assert edit.describe() == f"dose: 75 -> {edit.after}" and edit.error_type == "detail"
    added = edits_of("History of gout.")["entity_added"][0]
    assert added.error_type == "fabrication" and added.describe().startswith("entity_added: (nothi")
    assert edits_of("Denies fever.")["negation"][0].error_type == "negation"


@pytest.mark.skipif(not REAL.exists(), reason="the real data are not beside the checkout")
def test_real_references_are_changed_by_every_kind_and_most_changes_are_seen_by_another_detector():
    with (REAL / "mts-dialog" / "training.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    texts = [(row["ID"], row["section_text"], row["dialogue"]) for row in rows]
    edits = choose_edits(texts, seed=0, count=lambda text: len(text.split()))
    used = Counter(edit.kind for edit in edits.values())
    assert set(used) == KINDS and len(edits) > 900
    judge = get_detector("entities")
    seen = Counter()
    for name, text, _ in texts:
        if name in edits:
            changed = judge.judge(Source(text), edits[name].apply(text)).errors
            seen[edits[name].kind] += changed > judge.judge(Source(text), text).errors
    assert sum(seen.values()) > 0.9 * len(edits)
    assert all(seen[kind] == used[kind] for kind in ("age", "dose", "invented_finding"))

"""Typed errors: every kind changes what the text says, on clinic notes and on other text."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter

import pytest
from data_factory import REAL
from hypothesis import given, settings
from hypothesis import strategies as st

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_summary
from hallulib.detectors import Source, choose_edits, find_edits, get_detector

pytestmark = pytest.mark.unit
KINDS = set(
    "number dose unit side negation age sex entity_swapped entity_added invented_finding".split()
)
NOTES = make_notes(400, seed=11, missing_rate=0.2)
TEXTS = [(note.id, write_summary(note.facts), note.text) for note in NOTES]


def count_words(text: str) -> int:
    return len(text.split())


def measure_growth(edit, count=count_words) -> int:
    return count(f" {edit.after}") - count(f" {edit.before}")


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
        ("invented_finding", "He is well. He eats.", r"He is well\. (?!He eats)[A-Z][\w' ]+\."),
        ("invented_finding", "He is well.", r"He is well\. \w+.*\."),
    ],
)
def test_a_value_is_exchanged_for_another_of_its_kind(kind, text, pattern):
    found = afters(text, kind)
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


def test_nothing_that_the_note_says_is_put_in_under_any_of_its_names():
    note = "Pain in the left knee and the right knee. Takes 20 mg, before 40 mg. Gout, CHF."
    assert afters("Pain in the left knee.", "side", note) == []
    assert not any("40" in text for text in afters("Takes 20 mg.", "dose", note))
    swaps = [edits_of("History of gout.", note, seed)["entity_swapped"] for seed in range(60)]
    drawn = {edit.after.lower() for edits in swaps for edit in edits}
    assert len(drawn) > 30 and not drawn & {"heart failure", "congestive heart failure", "chf"}


def test_a_phrase_is_stated_only_as_whole_words_and_whole_numbers():
    text = "Takes 20 mg."
    for inside in ("Takes 140 mg.", "Takes 40.5 mg.", "Takes 0.40 mg.", "Takes 40mg."):
        assert "Takes 40 mg." in afters(text, "dose", inside)
    assert "Takes 40 mg." not in afters(text, "dose", "Takes 40.")
    assert afters("Pain for 2 days.", "unit", "Pain for 2 days, then 12 WEEKS.")
    assert afters("Pain for 2 days.", "unit", "Pain for 2 days, then 2 WEEKS.") == []


def test_an_edit_describes_itself_and_has_a_place_in_the_taxonomy():
    edit = edits_of("Takes aspirin 75 mg.")["dose"][0]
    assert edit.describe() == f"dose: 75 -> {edit.after}" and edit.error_type == "detail"
    added = edits_of("History of gout.")["entity_added"][0]
    assert added.error_type == "fabrication" and added.describe().startswith("entity_added: (nothi")
    assert edits_of("Denies fever.")["negation"][0].error_type == "negation"


# --- proof on many texts ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(NOTES) - 1), st.integers(0, 1000))
def test_every_edit_makes_a_faithful_summary_wrong_by_the_exact_checker(number, seed):
    _, summary, text = TEXTS[number]
    source, exact = Source(text, NOTES[number].facts), get_detector("facts")
    assert not exact.judge(source, summary).errors
    for kind, edits in edits_of(summary, text, seed).items():
        for edit in edits:
            judged = exact.judge(source, edit.apply(summary))
            may_be_unread = kind in ("negation", "invented_finding") and judged.unparsed
            assert judged.errors or may_be_unread, (edit.describe(), summary)


def test_the_clinic_allows_every_kind_equally_often_and_length_does_not_tell():
    edits = choose_edits(TEXTS, seed=0, count=count_words)
    assert len(edits) == len(NOTES)
    used = Counter(edit.kind for edit in edits.values())
    assert set(used) == KINDS and max(used.values()) - min(used.values()) <= 2
    growths = list(map(measure_growth, edits.values()))
    assert abs(sum(growths)) <= 20  # of more than 20,000 words
    longer, shorter = (sum(sign * growth > 0 for growth in growths) for sign in (1, -1))
    assert 0.4 < (longer + (len(growths) - longer - shorter) / 2) / len(growths) < 0.6


def test_of_several_edits_the_one_is_taken_that_evens_out_the_lengths():
    for name, text, note in TEXTS[:40]:
        (edit,) = choose_edits([(name, text, note)], seed=0, count=len).values()
        others = find_edits(text, note, random.Random(f"perturb-0-{name}"))[edit.kind]
        growth = abs(measure_growth(edit, len))
        assert growth == min(abs(measure_growth(other, len)) for other in others)


def test_texts_that_could_only_grow_are_left_out_once_the_wrong_sides_are_longer():
    texts = [(str(i), "He sleeps.", "He sleeps.") for i in range(50)]
    edits = choose_edits(texts, seed=0, count=count_words)
    assert 0 < len(edits) < 10 and sum(map(measure_growth, edits.values())) < 20


@pytest.mark.skipif(not REAL.exists(), reason="the real data are not beside the checkout")
def test_real_references_are_changed_by_every_kind_and_most_changes_are_seen_by_another_detector():
    with (REAL / "mts-dialog" / "training.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    texts = [(row["ID"], row["section_text"], row["dialogue"]) for row in rows]
    edits = choose_edits(texts, seed=0, count=count_words)
    used = Counter(edit.kind for edit in edits.values())
    assert set(used) == KINDS and len(edits) > 900
    judge, seen = get_detector("entities"), Counter()
    for name, text, _ in texts:
        if name in edits:
            changed = judge.judge(Source(text), edits[name].apply(text)).errors
            seen[edits[name].kind] += changed > judge.judge(Source(text), text).errors
    assert sum(seen.values()) > 0.9 * len(edits)
    assert all(seen[kind] == used[kind] for kind in ("age", "dose", "invented_finding"))

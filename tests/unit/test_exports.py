"""Exports of the grades, the adjudication, and the detector calibrated by grades."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree

import pytest
from test_agreement import WRONG, make_run, simulate

from hallulib.assessment.adjudicate import open_adjudication
from hallulib.assessment.analyse import (
    analyse_assessment,
    calibrate_detector,
    compare_repeats,
)
from hallulib.assessment.exports import export_assessment, make_preference_pairs
from hallulib.assessment.records import read_sessions
from hallulib.assessment.simulate import judge_by_evaluation, simulate_assessment
from hallulib.assessment.start import open_session
from hallulib.assessment.widget import AssessmentWidget
from hallulib.errors import SessionError

pytestmark = pytest.mark.unit


def grade_all(run, recipe, assessor, wrong_on=()):
    """Grade what is right as right, except at the given places in the order of item ids."""
    with open_session(run, recipe, assessor) as session:
        while entry := session.current:
            bad = (WRONG in entry.summaries[0]) != (entry.item_id in wrong_on)
            session.grade("hallucinated" if bad else "supported")


@pytest.fixture
def graded(tmp_path):
    """A run that "Ann" and "=Bo" graded; they differ on both summaries of two notes."""
    recipe, run = make_run(tmp_path, repeat_share=0)
    grade_all(run, recipe, "Ann")
    grade_all(run, recipe, "=Bo", wrong_on=("n1", "n2"))
    return recipe, run


def test_assessors_are_compared_on_what_both_graded_whatever_their_order(graded):
    recipe, run = graded
    found = analyse_assessment(recipe, run).assessors
    (pair,) = found["pairs"]
    assert (pair["n"], pair["agreed"], found["disagreements"]) == (24, 20, 4)
    assert pair["kappa"]["low"] < pair["kappa"]["value"] < pair["kappa"]["high"]
    assert "alpha over 24 summaries: 0." in " ".join(analyse_assessment(recipe, run).sentences())


def test_what_is_said_of_a_repeated_item_counts_only_against_oneself(tmp_path):
    recipe, run = make_run(tmp_path)
    grade_all(run, recipe, "Ann")
    with open_session(run, recipe, "Bo") as session:
        while entry := session.current:
            bad = (WRONG in entry.summaries[0]) != entry.is_repeat  # another mind at every repeat
            session.grade("hallucinated" if bad else "supported")
    result = analyse_assessment(recipe, run)
    assert result.assessors["disagreements"] == 0 and result.assessors["pairs"][0]["n"] == 24
    records = {record.header.assessor_id: record for record in read_sessions(run)}
    assert compare_repeats(records["Bo"])["agreed"] == 0
    assert compare_repeats(records["Ann"])["agreed"] == compare_repeats(records["Bo"])["n"] == 6


def test_two_sessions_of_one_person_are_not_two_assessors(graded):
    recipe, run = graded
    shorter = recipe.model_copy(
        update={"assessment": recipe.assessment.model_copy(update={"items": 4})}
    )
    grade_all(run, shorter, "Ann")
    found = analyse_assessment(recipe, run).assessors
    assert sorted(found["assessors"]) == ["=Bo", "Ann"] and len(found["pairs"]) == 1
    assert found["pairs"][0]["n"] == 24  # Ann's fullest


def test_disputes_are_settled_in_the_same_view_and_without_names(graded):
    recipe, run = graded
    found = open_adjudication(run, recipe, "Chris")
    widget = AssessmentWidget(found.session, quick=True, opinions=found.opinions)
    assert len(found.session.entries) == 4
    shown = " ".join(widget.regions.values())
    assert "Assessor A: " in shown and "Assessor B: " in shown
    for hidden in ("Ann", "=Bo", "sft", "dpo"):
        assert hidden not in shown
    while found.session.current:
        widget.press_key("2")
    actions = [e.action for e in found.session._log.events]
    assert actions.count("adjudicate") == 4
    found.session.close()
    result = analyse_assessment(recipe, run)
    assert result.adjudicated == 4 and result.assessor in ("Ann", "=Bo")
    rates = {rate["system"]: rate["k"] for rate in result.systems}
    assert rates == {"sft": 9, "dpo": 2}  # Chris called both of n1 and n2 hallucinated


def test_adjudication_is_refused_where_nothing_is_in_dispute(tmp_path):
    recipe, run = make_run(tmp_path)
    grade_all(run, recipe, "Ann")
    with pytest.raises(SessionError, match="no summary has two different verdicts"):
        open_adjudication(run, recipe, "Chris")


def test_the_table_has_a_line_per_grade_names_no_sealed_system_and_runs_no_formula(graded):
    recipe, run = graded
    text = export_assessment(run)["grades.csv"].read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 48 and {row["system"] for row in rows} == {"sealed"}
    assert {row["assessor"] for row in rows} == {"Ann", "'=Bo"}
    with open_session(run, recipe, "Ann") as session:
        session.unblind()
    rows = [json.loads(x) for x in export_assessment(run)["grades.jsonl"].open(encoding="utf-8")]
    named = {(row["assessor"], row["system"]) for row in rows}
    assert named == {("Ann", "sft"), ("Ann", "dpo"), ("=Bo", "sealed")}


def test_label_studio_gets_regions_with_their_text_and_names_its_interface_knows(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    with open_session(run, recipe, "Ann") as session:
        session.skip()
    paths = export_assessment(run)
    tasks = json.loads(paths["label_studio.json"].read_text("utf-8"))
    interface = ElementTree.fromstring(paths["label_studio.xml"].read_text("utf-8"))
    controls = {tag.get("name"): tag for tag in interface if tag.get("toName") == "summary"}
    shown = {tag.get("value").removeprefix("$") for tag in interface if tag.tag == "Text"}
    regions = [(task, region) for task in tasks for region in task["annotations"][0]["result"]]
    assert {region["from_name"] for _, region in regions} == {"error", "verdict", "omissions"}
    for task, region in regions:
        assert shown <= task["data"].keys() and region["to_name"] == "summary"
        control, value = controls[region["from_name"]], region["value"]
        assert control.tag.lower() == region["type"]
        given = value.get("labels") or value.get("choices")
        allowed = {tag.get("value") for tag in control}
        assert given is None or set(given) <= allowed
        if "start" in value:
            assert task["data"]["summary"][value["start"] : value["end"]] == value["text"] == WRONG
    assert sum(task["annotations"][0]["was_cancelled"] for task in tasks) == 1


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20:argilla")
def test_argillas_own_client_reads_the_records(tmp_path):
    import argilla

    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    rows = json.loads(export_assessment(run)["argilla.json"].read_text("utf-8"))
    records = [argilla.Record.from_dict(row) for row in rows]
    assert len(records) == 30
    for record in records:
        responses = {response.question_name: response.value for response in record.responses}
        wrong = WRONG in record.fields["summary"]
        assert responses["verdict"] == ("hallucinated" if wrong else "supported")
        for span in responses.get("errors", []):
            assert record.fields["summary"][span["start"] : span["end"]] == WRONG
            assert span["label"] == "fabrication"


def test_sentences_are_rated_apart_from_summaries_and_general_knowledge_apart_from_errors(tmp_path):
    recipe, run = make_run(tmp_path)  # with items shown twice, which count once
    simulate(run, recipe)
    rates = {rate["system"]: rate for rate in analyse_assessment(recipe, run).by_sentence}
    sft = rates["sft"]
    assert (sft["hallucinated"], sft["n"], sft["types"]) == (9, 21, {"fabrication": 9})
    assert sft["low"] < sft["value"] == 9 / 21 < sft["high"]
    dpo = rates["dpo"]
    assert (dpo["hallucinated"], dpo["n"], dpo["omitting"]) == (0, 12, 12)
    assert dpo["low"] == 0 and dpo["high"] == pytest.approx(0.2425, abs=1e-4)  # Wilson, 0 of 12
    with open_session(run, recipe, "Ann") as session:
        widget = AssessmentWidget(session)
        for _ in widget.sentences():
            widget.press_key("4")
        widget.press_key("Enter")
    result = analyse_assessment(recipe, run)
    (found,) = result.by_sentence
    assert found["general_knowledge"] == found["n"] and found["hallucinated"] == 0
    assert result.systems[0]["k"] == 0


def prefer_all(tmp_path):
    recipe, run = make_run(tmp_path, mode="ab", items=12, repeat_share=0)
    with open_session(run, recipe, "simulated") as session:
        simulate_assessment(session, judge_by_evaluation(run), 0.0)
    return run


def test_preferences_become_pairs_and_ties_do_not(tmp_path):
    pairs = make_preference_pairs(prefer_all(tmp_path), held_out=())
    assert len(pairs) == 9
    assert all(WRONG in pair["rejected"] and WRONG not in pair["chosen"] for pair in pairs)
    assert {pair["prompt"] for pair in pairs} == {"Summarise."}


def test_preferences_stand_in_the_table(tmp_path):
    paths = export_assessment(prefer_all(tmp_path))
    rows = [json.loads(line) for line in paths["grades.jsonl"].open(encoding="utf-8")]
    assert len(rows) == 12 and sum(row["preference"] == 0 for row in rows) == 3
    assert paths["label_studio.json"].read_text() == "[]\n"


def test_a_test_item_is_refused_as_a_training_pair(tmp_path):
    with pytest.raises(SessionError, match="'n3' is of the test split"):
        make_preference_pairs(prefer_all(tmp_path), held_out=["n3"])


def test_the_detector_is_corrected_by_enough_grades_and_not_by_too_few():
    def rate(graded):
        detector = {(str(i), "sft"): ("d", i % 2 == 0) for i in range(400)}  # says 50 %
        verdicts = [  # people: every flag on an item divisible by 4 is a false alarm
            (str(i), "sft", "hallucinated" if i % 4 == 2 else "supported", False)
            for i in range(graded)
        ]
        return calibrate_detector(verdicts, detector)[0]

    few, enough = rate(20), rate(80)
    assert few["method"].startswith("Wilson") and few["value"] == 0.25
    assert enough["method"] == "PPI++" and enough["value"] == pytest.approx(0.25, abs=0.02)
    assert enough["high"] - enough["low"] < 0.2 and enough["scored"] == 320

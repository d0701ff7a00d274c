"""Several assessors, the adjudication, the detector calibrated by grades, and exports."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree

import pandas as pd
import pytest
from test_agreement import WRONG, count, find, make_run, simulate
from test_session import is_repeat

from hallulib.assessment import (
    AssessmentWidget,
    analyse_assessment,
    export_assessment,
    open_adjudication,
    open_session,
)
from hallulib.assessment.analyse import measure_systems
from hallulib.assessment.log import ERROR_TYPES
from hallulib.errors import SessionError

pytestmark = pytest.mark.unit


def is_wrong(item):
    return WRONG in item.summaries[0]


def grade_all(run, recipe, assessor, judge=lambda session, item: is_wrong(item)):
    """Grade all items by a rule; without one, what is right as right."""
    with open_session(run, recipe, assessor) as session:
        while item := session.current:
            verdict = "hallucinated" if judge(session, item) else "supported"
            session.act("grade", verdict=verdict)


@pytest.fixture
def graded(tmp_path):
    """A run that "Ann" and "=Bo" graded; they differ on both summaries of two notes."""
    recipe, run = make_run(tmp_path, repeat_share=0)
    grade_all(run, recipe, "Ann")
    grade_all(run, recipe, "=Bo", lambda _, item: (item.item_id in ("n1", "n2")) != is_wrong(item))
    return recipe, run


def test_assessors_are_compared_on_what_both_graded_whatever_their_order(graded):
    recipe, run = graded
    result = analyse_assessment(recipe, run)
    assert count(result, "agreement", "=Bo and Ann") == (20, 24)
    assert result.summary["disputed"] == 4
    kappa, alpha = find(result, "kappa", "=Bo and Ann"), find(result, "alpha", "all assessors")
    # 20 of 24 agree; 9 and 9 (other ones) of 24 hallucinated: by hand
    assert kappa["value"] == pytest.approx(1 - (4 / 24) / (1 - (9 / 24) ** 2 - (15 / 24) ** 2))
    assert kappa["low"] < kappa["value"] < kappa["high"]
    assert alpha["n"] == 24 and alpha["low"] < alpha["value"] < alpha["high"]
    assert "all assessors, alpha: 0.6" in " ".join(result.sentences())


def test_what_is_said_of_a_repeated_item_counts_only_against_oneself(tmp_path):
    recipe, run = make_run(tmp_path)
    grade_all(run, recipe, "Ann")
    # Bo is of another mind at every repeat
    grade_all(run, recipe, "Bo", lambda session, item: is_wrong(item) != is_repeat(session, item))
    result = analyse_assessment(recipe, run)  # of Bo, the newest of equally full ones
    assert result.summary["disputed"] == 0
    assert count(result, "agreement", "Ann and Bo") == (24, 24)
    assert result.summary["assessor"] == "Bo"
    assert count(result, "agreement", "assessor with themselves") == (0, 6)


def test_kappa_without_variation_is_undefined_not_nan_and_not_one(tmp_path):
    recipe, run = make_run(tmp_path, notes=2)
    for assessor in ("Ann", "Bo"):
        grade_all(run, recipe, assessor, lambda session, item: False)
    row = find(analyse_assessment(recipe, run), "kappa", "Ann and Bo")
    assert row["text"] == "undefined (no variation)" and row.get("value") is None


def test_two_sessions_of_one_person_are_not_two_assessors(graded):
    recipe, run = graded
    shorter = recipe.model_copy(
        update={"assessment": recipe.assessment.model_copy(update={"items": 4})}
    )
    grade_all(run, shorter, "Ann")
    grade_all(run, shorter, " ANN")
    result = analyse_assessment(recipe, run)
    between = [row["of"] for row in result.summary["figures"] if " and " in row["of"]]
    assert set(between) == {"=Bo and Ann", "assessor and detector"}
    assert count(result, "agreement", "=Bo and Ann") == (20, 24)  # Ann's fullest


def test_disputes_are_settled_in_the_same_view_and_without_names(graded):
    recipe, run = graded
    session, opinions = open_adjudication(run, recipe, "Chris")
    widget = AssessmentWidget(session, quick=True, opinions=opinions)
    assert len(session.items) == 4
    shown = " ".join(widget.regions.values())
    assert "Assessor A: " in shown and "Assessor B: " in shown
    for hidden in ("Ann", "=Bo", "sft", "dpo"):
        assert hidden not in shown
    while session.current:
        widget.press("verdict_hallucinated")
    session.close()
    result = analyse_assessment(recipe, run)
    assert result.summary["adjudicated"] == 4 and result.summary["assessor"] in ("Ann", "=Bo")
    assert count(result, "hallucinated", "sft")[0] == 9
    assert count(result, "hallucinated", "dpo")[0] == 2  # Chris called both of n1 and n2 so


def test_what_is_settled_twice_counts_once_and_leaves_the_agreement_with_oneself_alone(tmp_path):
    recipe, run = make_run(tmp_path)
    grade_all(run, recipe, "Ann")
    # Bo differs on n1, and from themselves
    grade_all(run, recipe, "Bo", lambda s, item: (item.item_id == "n1") != is_repeat(s, item))
    before = count(analyse_assessment(recipe, run), "agreement", "assessor with themselves")
    assert before == (0, 6)
    for judge, verdict in (("Chris", "supported"), ("Dan", "hallucinated")):
        session, _ = open_adjudication(run, recipe, judge)
        with session:
            while session.current:
                session.act("grade", verdict=verdict)
    result = analyse_assessment(recipe, run)
    assert count(result, "agreement", "assessor with themselves") == before
    assert result.summary["adjudicated"] == result.summary["disputed"] == len(session.items)
    hallucinated = sum(count(result, "hallucinated", system)[0] for system in ("sft", "dpo"))
    assert hallucinated == len(session.items) + 1  # n1 under sft: both had called it so


def test_adjudication_is_refused_where_nothing_is_in_dispute(tmp_path):
    recipe, run = make_run(tmp_path)
    with pytest.raises(SessionError, match="0 assessor"):
        open_adjudication(run, recipe, "Chris")
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
        session.act("skip")
    paths = export_assessment(run)
    tasks = json.loads(paths["label_studio.json"].read_text("utf-8"))
    interface = ElementTree.fromstring(paths["label_studio.xml"].read_text("utf-8"))
    controls = {tag.get("name"): tag for tag in interface if tag.get("toName") == "summary"}
    assert {tag.get("value") for tag in controls["error"]} == {*ERROR_TYPES}
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


@pytest.mark.parametrize(
    "start", ["=", " =", "\r\n=", "\u200b=", "\uff1d", "\t@", "+", "-", "\ufeff\uff0b"]
)
def test_no_remark_becomes_a_formula_or_breaks_the_table(tmp_path, start):
    recipe, run = make_run(tmp_path, notes=2)
    with open_session(run, recipe, "Ann") as session:
        session.act("note", text=f'{start}cmd|"x",1\rnext')
        session.act("grade", verdict="unsure")
        session.act("note", text="fine")
        session.act("skip")
    text = export_assessment(run)["grades.csv"].read_bytes().decode()
    first, second = csv.DictReader(io.StringIO(text, newline=""))
    assert first["note"].startswith("'") and 'cmd|"x",1\nnext' in first["note"]
    assert second["note"] == "fine" and "\r" not in text
    assert all(cell.startswith('"') for cell in text.splitlines()[0].split(","))


def test_sentences_are_rated_apart_from_summaries_and_general_knowledge_apart_from_errors(tmp_path):
    recipe, run = make_run(tmp_path)  # with items shown twice, which count once
    simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    sft = find(result, "hallucinated sentences", "sft")
    assert (sft["k"], sft["n"]) == (9, 21) and count(result, "fabrication", "sft") == (9, 9)
    assert sft["low"] < sft["value"] == 9 / 21 < sft["high"]
    dpo = find(result, "hallucinated sentences", "dpo")
    assert (dpo["k"], dpo["n"]) == (0, 12)
    assert count(result, "something left out", "dpo") == (12, 12)
    assert dpo["low"] == 0 and dpo["high"] == pytest.approx(0.2425, abs=1e-4)  # Wilson, 0 of 12
    with open_session(run, recipe, "Ann") as session:
        widget = AssessmentWidget(session)
        for _ in widget.sentences:
            widget.press("verdict_general_knowledge")
        widget.press("go_save")
    rows = analyse_assessment(recipe, run).summary["figures"]
    found = {row["figure"]: row for row in rows}
    assert found["general knowledge"]["value"] == 1
    assert found["hallucinated sentences"]["k"] == found["hallucinated"]["k"] == 0


def test_the_detector_is_corrected_by_enough_grades_and_not_by_too_few():
    def correct(graded):
        called = [True, False] * 200
        items = pd.DataFrame({"item_id": range(400), "system": "sft", "called": called})
        # people: every flag on an item divisible by 4 is a false alarm
        verdicts = ["hallucinated" if i % 4 == 2 else "supported" for i in range(graded)]
        items["verdict"] = verdicts + [None] * (400 - graded)
        return {figure: found for figure, _, found in measure_systems(items) if found}

    few = correct(20)["detector corrected (PPI++: too few grades)"]
    enough = correct(80)["detector corrected (PPI++)"]
    assert few.method.startswith("Wilson") and few.value == 0.25
    assert enough.value == pytest.approx(0.25, abs=0.02) and enough.n == 80
    assert enough.high - enough.low < 0.2

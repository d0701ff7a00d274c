"""Agreement, the scripted assessor, and the analysis of an assessment."""

import json

import pytest

from hallulib.assessment import (
    analyse_assessment,
    export_assessment,
    judge_by_evaluation,
    open_session,
    simulate_assessment,
)
from hallulib.errors import MissingArtifact, SessionError
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit

RIGHT, WRONG = "Heart rate 80.", "Allergy to penicillin."


def make_run(tmp_path, notes=12, **changes):
    """A run whose evaluation is recorded: sft invents an allergy in 3 of 4 notes, dpo in none."""
    chosen = {"items": 2 * notes, "repeat_share": 0.25, "assessor": "me"} | changes
    recipe = load_recipe("tiny-cpu", {"assessment": chosen})
    run = Run.open(tmp_path / "run", recipe)
    generations, verdicts = [], []
    for number in range(notes):
        for system in ("base", "sft", "dpo"):
            bad = system == "sft" and number % 4 != 0
            text = f"{RIGHT} {WRONG}" if bad else RIGHT
            generations.append(
                {"id": f"n{number}", "system": system, "context": f"Note {number}.", "text": text,
                 "prompt": "Summarise."}
            )  # fmt: skip
            verdicts.append(make_verdict(f"n{number}", system, text))
    write_evaluation(run, recipe, generations, verdicts)
    return recipe, run


def make_verdict(item, system, text):
    start = text.find(WRONG)
    statements = [{"start": 0, "end": len(RIGHT), "verdict": "supported", "error_type": None}]
    if start >= 0:
        wrong = {"verdict": "not_in_note", "error_type": "fabrication"}
        statements.append(wrong | {"start": start, "end": len(text)})
    return {
        "id": item, "system": system, "detector": "facts", "hallucinated": start >= 0,
        "statements": statements, "omissions": ["age"],
    }  # fmt: skip


def write_evaluation(run, recipe, generations, verdicts):
    folder = run.path("evaluation")
    folder.mkdir(exist_ok=True)
    for name, rows in (("generations", generations), ("evaluation", verdicts)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text("{}")
    for name in ("model_card.md", "report.html", "report.md"):
        (folder / name).write_text("text")
    run.record("evaluation", recipe, {}, {})
    # as if the stages before it had never been recorded, nor asked for
    run.update(lambda manifest: manifest["stages"]["evaluation"]["inputs"].clear())


def simulate(run, recipe, error_rate=0.0):
    with open_session(run, recipe, assessor="simulated") as session:
        return simulate_assessment(session, judge_by_evaluation(run), error_rate)


def find(result, figure, of):
    """One row of the figures: k, n, value, low, high, text."""
    (row,) = (r for r in result.summary["figures"] if (r["figure"], r["of"]) == (figure, of))
    return row


def count(result, figure, of):
    """(k, n) of a figure."""
    row = find(result, figure, of)
    return row["k"], row["n"]


def test_a_simulated_assessor_without_errors_reproduces_the_detector(tmp_path, capsys):
    recipe, run = make_run(tmp_path)
    graded = simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    summary = result.summary
    assert count(result, "hallucinated", "sft") == (9, 12)
    assert count(result, "hallucinated", "dpo") == (0, 12)
    assert summary["paired"]["b"] == 9 and summary["paired"]["c"] == 0
    assert count(result, "agreement", "assessor and detector") == (24, 24)
    assert find(result, "kappa", "assessor and detector")["value"] == 1
    assert summary["graded"] == graded == summary["total"] == 30
    assert count(result, "agreement", "assessor with themselves") == (6, 6)
    with open_session(run, recipe, assessor="simulated") as session:  # only looked at
        for item, state in zip(session.items, session.log.items, strict=True):
            wrong = {s: g for s, g in state["labels"].items() if g["verdict"] == "hallucinated"}
            texts = {sentence.sid: sentence.text for sentence in item.sentences}
            invented = [WRONG] if WRONG in item.summaries[0] else []
            assert [texts[sid] for sid in wrong] == invented
            assert all(label["type"] == "fabrication" for label in wrong.values())
            assert state["omissions"] == ["age"]
    assert analyse_assessment(recipe, run) == result
    assert "assessment: unchanged" in capsys.readouterr().out
    assert run.manifest["stages"]["assessment"]["notes"]["assessor_kind"] == "simulated"


def test_the_stated_error_rate_shows_in_the_agreement_and_between_repeats(tmp_path):
    recipe, run = make_run(tmp_path, notes=80, repeat_share=0.5)
    simulate(run, recipe, error_rate=0.2)
    result = analyse_assessment(recipe, run)
    by_detector = find(result, "agreement", "assessor and detector")
    assert by_detector["n"] == 160 and 0.70 < by_detector["value"] < 0.90
    by_themselves = find(result, "agreement", "assessor with themselves")
    assert 0.52 < by_themselves["value"] < 0.84  # 0.8 * 0.8 + 0.2 * 0.2 = 0.68


def test_a_script_must_not_grade_in_a_persons_session(tmp_path):
    recipe, run = make_run(tmp_path)
    with open_session(run, recipe) as session:
        with pytest.raises(SessionError, match="a script must not grade"):
            simulate_assessment(session, judge_by_evaluation(run))
        assert not session.log.progress()["graded"]


def test_simulated_grades_are_labelled_and_give_way_to_a_persons(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    assert result.summary["assessor_kind"] == "simulated"
    assert "SIMULATED" in " ".join(result.sentences())
    with open_session(run, recipe, assessor="Ann") as session:
        session.act("grade", verdict="unsure")
        session.act("grade", verdict="hallucinated")
    result = analyse_assessment(recipe, run)  # grades given since make the stage run again
    summary = result.summary
    assert (summary["assessor_kind"], summary["assessor"]) == ("human", "Ann")
    assert (summary["graded"], summary["total"]) == (2, 30)
    rates = [row for row in summary["figures"] if row["figure"] == "hallucinated"]
    assert sum(row["n"] for row in rates) == 1  # the unsure one is set apart
    assert {s["assessor"]: s["graded"] for s in summary["sessions"]} == {"simulated": 30, "Ann": 2}
    assert "SIMULATED" not in " ".join(result.sentences())
    assert "28 unfinished" in " ".join(result.sentences())


def test_sessions_about_summaries_generated_anew_are_listed_but_not_counted(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    rows = [json.loads(x) for x in run.path("evaluation/generations.jsonl").open()]
    verdicts = [json.loads(x) for x in run.path("evaluation/evaluation.jsonl").open()]
    changed = [row | {"context": "Another note."} for row in rows]
    write_evaluation(run, recipe, changed, verdicts)
    with pytest.raises(SessionError, match="Nobody has graded"):
        analyse_assessment(recipe, run)
    simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    assert sorted(s["current"] for s in result.summary["sessions"]) == [False, True]


def test_ab_preferences_are_counted_by_system_not_by_side_and_exported(tmp_path):
    recipe, run = make_run(tmp_path, mode="ab", items=12, repeat_share=0)
    simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    preferred = {name: count(result, "preferred", name)[0] for name in ("sft", "dpo", "neither")}
    assert preferred == {"sft": 0, "dpo": 9, "neither": 3}
    assert "hallucinated" not in set(result.figures["figure"])
    assert "dpo, preferred: 9 of 12 pairs" in " ".join(result.sentences())
    paths = export_assessment(run)
    rows = [json.loads(line) for line in paths["grades.jsonl"].open(encoding="utf-8")]
    assert len(rows) == 12 and sum(row["preference"] == 0 for row in rows) == 3
    assert paths["label_studio.json"].read_text() == "[]"


def test_an_assessment_before_the_evaluation_names_the_notebook(tmp_path):
    recipe = load_recipe("tiny-cpu")
    run = Run.open(tmp_path, recipe)
    with pytest.raises(MissingArtifact, match="06_evaluation"):
        open_session(run, recipe)


def test_an_exchanged_blind_key_is_refused_by_the_analysis(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    key = next(run.path("assessment").glob("*.key.json"))
    key.write_text(key.read_text().replace('"sft"', '"x"').replace('"dpo"', '"sft"'))
    with pytest.raises(SessionError, match="not the one the session was sealed with"):
        analyse_assessment(recipe, run)

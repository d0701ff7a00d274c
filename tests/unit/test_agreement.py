"""Agreement, the scripted assessor, and the analysis of an assessment."""

import json

import pytest

from hallulib.assessment.agreement import compare_grades
from hallulib.assessment.analyse import analyse_assessment, load_assessment_result
from hallulib.assessment.simulate import judge_by_evaluation, simulate_assessment
from hallulib.assessment.start import open_session
from hallulib.errors import MissingArtifact, SessionError
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit

RIGHT, WRONG = "Heart rate 80.", "Allergy to penicillin."


def test_kappa_carries_its_interval_and_falls_where_one_grade_is_rare():
    # 100 items, both say yes 5 times, 2 of them on the same item (reference/evaluation.md 4.5: .37)
    first = ["yes"] * 5 + ["no"] * 95
    second = ["yes"] * 2 + ["no"] * 3 + ["yes"] * 3 + ["no"] * 92
    found = compare_grades(first, second)
    assert found.share == pytest.approx(0.94)
    assert found.kappa.value == pytest.approx(0.3684, abs=1e-4)
    assert found.kappa.low < 0.3 < found.kappa.high
    assert found.kappa_text.startswith("0.37 (")


def test_kappa_without_variation_is_undefined_not_nan_and_not_one():
    agreement = compare_grades(["ok"] * 5, ["ok"] * 5)
    assert agreement.kappa.value is None and agreement.share == 1
    assert agreement.kappa_text == "undefined (no variation)"
    assert compare_grades(["ok"] * 5, ["bad"] * 5).kappa.value == 0  # constant, yet they differ


def test_agreement_carries_its_interval_and_its_n():
    agreement = compare_grades([1] * 10, [1] * 6 + [0] * 4)
    assert (agreement.agreed, agreement.n) == (6, 10)
    assert agreement.low == pytest.approx(0.3127, abs=1e-4)
    assert agreement.high == pytest.approx(0.8318, abs=1e-4)
    assert compare_grades([], []).kappa_text == "no items"
    with pytest.raises(ValueError, match="equally long|argument 2"):
        compare_grades([1], [1, 2])


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
    statements = [make_statement(RIGHT, 0, "supported", None)]
    if start >= 0:
        statements.append(make_statement(WRONG, start, "not_in_note", "fabrication"))
    return {
        "id": item, "system": system, "detector": "facts", "hallucinated": start >= 0,
        "statements": statements, "omissions": ["age"],
    }  # fmt: skip


def make_statement(text, start, verdict, error_type):
    place = {"text": text, "start": start, "end": start + len(text), "kind": "any", "evidence": ""}
    return place | {"verdict": verdict, "error_type": error_type}


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


def simulate(run, recipe, error_rate=0.0, limit=None):
    with open_session(run, recipe, assessor="simulated") as session:
        return simulate_assessment(session, judge_by_evaluation(run), error_rate, limit)


def test_a_simulated_assessor_without_errors_reproduces_the_detector(tmp_path):
    recipe, run = make_run(tmp_path)
    graded = simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    rates = {rate["system"]: (rate["k"], rate["n"]) for rate in result.systems}
    assert rates == {"sft": (9, 12), "dpo": (0, 12)}
    assert result.paired["b"] == 9 and result.paired["c"] == 0
    assert result.detector["share"] == 1 and result.detector["n"] == 24
    assert result.graded == graded == result.total == 30 and result.unfinished == 0
    assert result.intra_rater["n"] == 6 and result.intra_rater["share"] == 1


def test_simulated_sentence_grades_point_at_the_invented_sentence(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    with open_session(run, recipe, assessor="simulated") as session:
        for entry, state in zip(session.entries, session.state.entries, strict=True):
            wrong = [g for g in state.grades[1].labels if g.verdict == "hallucinated"]
            assert [g.text for g in wrong] == ([WRONG] if WRONG in entry.summaries[0] else [])
            assert all(g.type == "fabrication" for g in wrong)
            assert state.grades[1].omissions[0].text == "age"


def test_the_stated_error_rate_shows_in_the_agreement_and_between_repeats(tmp_path):
    recipe, run = make_run(tmp_path, notes=80, repeat_share=0.5)
    simulate(run, recipe, error_rate=0.2)
    result = analyse_assessment(recipe, run)
    assert result.detector["n"] == 160
    assert 0.70 < result.detector["share"] < 0.90
    assert 0.52 < result.intra_rater["share"] < 0.84  # 0.8 * 0.8 + 0.2 * 0.2 = 0.68


def test_a_script_must_not_grade_in_a_persons_session(tmp_path):
    recipe, run = make_run(tmp_path)
    with open_session(run, recipe) as session:
        with pytest.raises(SessionError, match="a script must not grade"):
            simulate_assessment(session, judge_by_evaluation(run))
        assert session.progress.graded == 0


def test_simulated_grades_are_labelled_and_give_way_to_a_persons(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    assert result.assessor_kind == "simulated" and "SIMULATED" in " ".join(result.sentences())
    with open_session(run, recipe, assessor="Ann") as session:
        session.grade("unsure")
        session.grade("hallucinated")
    result = analyse_assessment(recipe, run)  # grades given since make the stage run again
    assert (result.assessor_kind, result.assessor) == ("human", "Ann")
    assert (result.graded, result.unfinished) == (2, 28)
    assert sum(rate["n"] for rate in result.systems) == 1  # the unsure one is set apart
    assert {s["assessor"]: s["graded"] for s in result.sessions} == {"simulated": 30, "Ann": 2}
    assert "SIMULATED" not in " ".join(result.sentences())
    assert "28 unfinished" in " ".join(result.sentences())


def test_an_analysis_of_unchanged_grades_is_reused(tmp_path, capsys):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    first = analyse_assessment(recipe, run)
    open_session(run, recipe, assessor="simulated").close()  # only looked at
    again = analyse_assessment(recipe, run)
    assert again == first == load_assessment_result(run)
    assert "assessment: unchanged" in capsys.readouterr().out
    assert run.manifest["stages"]["assessment"]["notes"]["assessor_kind"] == "simulated"


def test_sessions_about_summaries_generated_anew_are_listed_but_not_counted(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    rows = [json.loads(x) for x in run.path("evaluation/generations.jsonl").open()]
    verdicts = [json.loads(x) for x in run.path("evaluation/evaluation.jsonl").open()]
    changed = [row | {"context": "Another note."} for row in rows]
    write_evaluation(run, recipe, changed, verdicts)
    with pytest.raises(SessionError, match="Nobody has graded"):
        analyse_assessment(recipe, run)
    simulate(run, recipe, limit=4)
    result = analyse_assessment(recipe, run)
    assert result.graded == 4
    assert sorted(s["current"] for s in result.sessions) == [False, True]


def test_ab_preferences_are_counted_by_system_not_by_side(tmp_path):
    recipe, run = make_run(tmp_path, mode="ab", items=12, repeat_share=0)
    simulate(run, recipe)
    result = analyse_assessment(recipe, run)
    assert result.preferences == {"sft": 0, "dpo": 9, "tie": 3}
    assert result.systems == [] and "dpo 9" in " ".join(result.sentences())


def test_an_assessment_before_the_evaluation_names_the_notebook(tmp_path):
    recipe = load_recipe("tiny-cpu")
    run = Run.open(tmp_path, recipe)
    with pytest.raises(MissingArtifact, match="06_evaluation"):
        open_session(run, recipe)


def test_an_exchanged_blind_key_is_refused_by_the_analysis(tmp_path):
    recipe, run = make_run(tmp_path)
    simulate(run, recipe)
    key = next(run.path("assessment").glob("*.blind_key.json"))
    key.write_text(key.read_text().replace('"sft"', '"x"').replace('"dpo"', '"sft"'))
    with pytest.raises(SessionError, match="not the one the session was sealed with"):
        analyse_assessment(recipe, run)

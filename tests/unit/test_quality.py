"""How good a detector is: every figure by hand, against scikit-learn, and on real labelled text."""

from __future__ import annotations

import sys

import pytest
from data_factory import REAL

from hallulib.detectors import (
    Case,
    Judgement,
    Source,
    StatementVerdict,
    get_detector,
    measure_detector,
    measure_judge,
)
from hallulib.errors import DataError
from hallulib.files import project_root

sys.path.append(str(project_root() / "benchmarks"))
from cases import read_medec_cases, read_mts_cases  # noqa: E402

pytestmark = pytest.mark.unit
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real data are not beside it")


class FixedJudge:
    """Calls given letters wrong; every letter is a statement."""

    def __init__(self, wrong: str) -> None:
        self.name, self.wrong = "fixed", wrong

    def judge(self, source: Source, summary: str) -> Judgement:
        verdicts = ["not_in_note" if letter in self.wrong else "supported" for letter in summary]
        found = [
            StatementVerdict(summary[i], i, i + 1, "letter", v) for i, v in enumerate(verdicts)
        ]
        return Judgement(found, [], self.name)


def test_measuring_a_judge_fills_each_cell_of_the_table():
    rows = [(Source("n"), "abcdef")]
    quality = measure_judge(FixedJudge("abc"), rows, FixedJudge("ad"))
    assert [quality[k] for k in ("tp", "fp", "fn", "tn")] == [1, 2, 1, 2]
    assert quality["sensitivity"]["value"] == 0.5
    missed = measure_judge(FixedJudge(""), [(Source("n"), "a")], FixedJudge("a"))
    assert [missed[k] for k in ("tp", "fp", "fn", "tn")] == [0, 0, 1, 0]
    assert missed["specificity"] is None and missed["auroc"] is None
    with pytest.raises(DataError, match="not compared"):
        measure_judge(FixedJudge(""), [], FixedJudge(""))


class ReadsItsText:
    """Gives the verdict that the text asks for, and how surely: "wrong 0.9", "fine", "unread"."""

    name = "reads"

    def judge(self, source: Source, text: str) -> Judgement:
        said, _, score = text.partition(" ")
        verdict = {"wrong": "not_in_note", "fine": "supported", "unread": "unparsed"}[said]
        sure = float(score) if score else None
        statement = StatementVerdict(text, 0, len(text), "text", verdict, score=sure)
        return Judgement([statement], [], self.name)


def make_cases(tp: int, fn: int, fp: int, tn: int, in_group: int = 1) -> list[Case]:
    cells = [(True, "wrong", tp), (True, "fine", fn), (False, "wrong", fp), (False, "fine", tn)]
    made = [(wrong, text) for wrong, text, count in cells for _ in range(count)]
    return [Case(Source(""), t, w, str(i // in_group)) for i, (w, t) in enumerate(made)]


def test_the_figures_are_those_worked_by_hand():
    quality = measure_detector(ReadsItsText(), make_cases(17, 3, 6, 34), "summary")
    by_hand = {
        "sensitivity": 17 / 20, "specificity": 34 / 40, "balanced_accuracy": 0.85,
        "mcc": (17 * 34 - 6 * 3) / (23 * 20 * 40 * 37) ** 0.5,
        "auroc": 0.85,  # yes or no: the balanced accuracy
    }  # fmt: skip
    assert {name: quality[name]["value"] for name in by_hand} == pytest.approx(by_hand)
    assert all(quality[n]["low"] < quality[n]["value"] < quality[n]["high"] for n in by_hand)


def test_the_auroc_uses_the_scores_and_not_the_yes_or_no():
    cases = [Case(Source(""), f"wrong {score}", wrong, str(score)) for wrong, score in
             [(True, 0.9), (False, 0.8), (True, 0.7), (False, 0.2)]]  # fmt: skip
    quality = measure_detector(ReadsItsText(), cases, "summary")
    assert quality["auroc"]["value"] == 0.75
    assert quality["balanced_accuracy"]["value"] == 0.5


def test_what_one_side_could_not_read_is_counted_and_in_no_rate():
    unread = Case(Source(""), "unread", True, "x")
    quality = measure_detector(ReadsItsText(), [*make_cases(5, 5, 5, 5), unread], "summary")
    assert (quality["n"], quality["unmatched"]) == (20, 1)
    assert quality["sensitivity"]["n"] == 10
    rows = [(Source("n"), text) for text in ("wrong", "unread", "fine")]
    quality = measure_judge(FixedJudge("wu"), rows, ReadsItsText())
    assert (quality["n"], quality["unmatched"]) == (2, 1)


def test_units_of_one_document_are_resampled_together():
    found = [
        measure_detector(ReadsItsText(), make_cases(40, 10, 10, 40, size), "statement")["mcc"]
        for size in (1, 25)
    ]
    width, wider = (rate["high"] - rate["low"] for rate in found)
    assert wider > width


def test_a_detector_is_held_against_peoples_labels():
    cases = [Case(Source("Takes aspirin."), text, wrong, str(place)) for place, (text, wrong) in
             enumerate([("Aspirin.", False), ("Warfarin.", True), ("...", True)])]  # fmt: skip
    quality = measure_detector(get_detector("entities"), cases, "sentence")
    assert (quality["tp"], quality["tn"], quality["unmatched"]) == (1, 1, 1)
    assert (quality["detector"], quality["truth"]) == ("entities", "people")


MEDEC = "Text ID,Error Flag,Error Type,Error Sentence,Corrected Sentence,Corrected Text\n"


def test_what_medec_rows_leave_out_is_counted(tmp_path):
    path = tmp_path / "medec.csv"
    path.write_text(MEDEC + "a,1,dose,Bad.,Good.,Good.\nb,0,,,,x\nc,1,t,,Good.,Good.\nd,?,,,,x\n")
    cases, dropped = read_medec_cases(path)
    assert [(c.text, c.hallucinated, c.group) for c in cases] == [
        ("Bad.", True, "a"), ("Good.", False, "a"),
    ]  # fmt: skip
    assert list(dropped.values()) == [1, 1, 1]


def test_grades_that_are_no_rate_are_counted_and_not_taken_for_zero(tmp_path):
    summaries, grades = tmp_path / "summaries.csv", tmp_path / "grades.csv"
    summaries.write_text("ID,Dialogue,Automatic Summary\n0,d,s\n1,d,s\n2,d,s\n3,d,\n")
    grades.write_text("HallucinationRate\n0.5\n-1\nnone\n0\n", encoding="utf-8-sig")
    cases, dropped = read_mts_cases(summaries, grades)
    assert [c.hallucinated for c in cases] == [True]
    assert dropped == {"row with an empty field": 1, "grade that is no rate": 2}
    grades.write_text("HallucinationRate\n0.5\n")
    with pytest.raises(DataError, match=r"summaries.csv has 4 rows, .*grades.csv 1"):
        read_mts_cases(summaries, grades)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("", "No columns"), ("a,b\n1,2\n", ".*Text ID"),
     (b"\xff\xfe\x00bad", ".*decode")],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "medec.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=f"medec.csv cannot be read: .*{message}"):
        read_medec_cases(path)


@needs_real
def test_the_rules_find_most_errors_of_real_clinical_sentences():
    cases, dropped = read_medec_cases(REAL / "medec" / "validation.csv")
    assert (len(cases), dropped["note without an error"]) == (638, 255)
    quality = measure_detector(get_detector("entities"), cases, "sentence")
    assert quality["sensitivity"]["low"] > 0.8  # before terms were known: 0.74
    assert quality["specificity"]["low"] > 0.95
    assert quality["auroc"]["low"] > 0.95


@needs_real
def test_the_rules_take_most_paraphrases_of_real_dialogues_for_inventions():
    """What MEDEC's copied sentences hide: this detector must not report on such text alone."""
    files = [REAL / "mts-dialog" / f"{n}.csv" for n in ("automatic_summaries", "manual_scores")]
    cases, dropped = read_mts_cases(*files)
    assert (len(cases), sum(c.hallucinated for c in cases)) == (400, 33)
    assert not any(dropped.values())
    quality = measure_detector(get_detector("entities"), cases, "summary")
    assert quality["sensitivity"]["low"] > 0.8
    assert quality["specificity"]["high"] < 0.5
    assert 0.6 < quality["auroc"]["low"] and quality["auroc"]["high"] < 0.85

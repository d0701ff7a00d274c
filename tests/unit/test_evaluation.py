"""Evaluation: what the numbers mean, what the sentences say, and how text is marked."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.contingency_tables import mcnemar

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_summary
from hallulib.detectors import Source, get_detector
from hallulib.errors import DataError
from hallulib.evaluation import (
    PRIMARY,
    build_summary,
    find_changed_items,
    headline_rows,
    highlight_statements,
    make_record,
    result_sentences,
    say_small_n,
)
from hallulib.evaluation.metrics import compare_together

pytestmark = pytest.mark.unit
NOTES = make_notes(60, seed=9, missing_rate=0.3)
INVENTED = " Smoking: 90 pack-years."


def write(note, how: str) -> str:
    """A summary of a note that is clean, invents, leaves out, or says nothing."""
    texts = {
        "clean": write_summary(note.facts),
        "invents": write_summary(note.facts) + INVENTED,
        "short": write_summary({k: v for k, v in note.facts.items() if k != "medications"}),
        "empty": "",
        "garbage": "ba ba ba.",
    }
    return texts.get(how, how)


def make_records(
    system: str, hows: list[str], groups: list[str] | None = None, detector: str = "facts"
) -> list[dict]:
    """Records of what a system wrote: a word of `write` for each note, or the text itself."""
    records, judge = [], get_detector(detector)
    for place, (note, how) in enumerate(zip(NOTES, hows, strict=False)):
        text = write(note, how)
        generation = {
            "id": note.id, "group_id": note.id, "style": note.style, "system": system,
            "style_group": groups[place] if groups else "seen", "text": text,
            "n_tokens": len(text.split()), "finish_reason": "stop",
        }  # fmt: skip
        records.append(make_record(generation, judge.judge(Source(note.text, note.facts), text)))
    return records


def summarise(records: list[dict]) -> dict:
    """The figures of the one system in `records`."""
    (figures,) = build_summary(records)["systems"].values()
    return figures


def compare(before: list[dict], after: list[dict]) -> dict:
    (comparison,) = build_summary(before + after)["comparisons"]
    return comparison


# --- metrics --------------------------------------------------------------------------------


def test_the_primary_rate_counts_answered_summaries_and_null_is_never_false():
    records = make_records("sft", ["invents"] * 6 + ["clean"] * 4 + ["empty"] * 2 + ["garbage"])
    figures = summarise(records)
    rate = figures["rates"][PRIMARY]
    assert (rate["k"], rate["n"], rate["unit"]) == (6, 10, "answered summaries")
    assert figures["interval"] == pytest.approx([0.3127, 0.8318], abs=1e-4)
    assert figures["rates"]["hallucination_rate@all"]["n"] == 13
    assert figures["answer_rate"] == pytest.approx(10 / 13)
    assert figures["unparsed_statements"] == 1
    assert figures["rates"]["suspect_rate@summary"]["k"] == 9
    assert [r["hallucinated"] for r in records[-3:]] == [None] * 3


def test_omissions_are_the_share_of_stated_facts_that_the_summary_lacks():
    records = make_records("x", ["short"] * 10 + ["clean"] * 10)
    stated = sum(len(note.facts) for note in NOTES[:20])
    rate = summarise(records)["rates"]["omission_rate"]
    assert (rate["k"], rate["n"]) == (10, stated)
    assert rate["low"] < rate["value"] < rate["high"]
    assert [r["omissions"] for r in records] == [["medications"]] * 10 + [[]] * 10


def test_summaries_of_one_document_are_resampled_together():
    records = make_records("x", ["invents"] * 10 + ["clean"] * 30)
    alone = summarise(records)["rates"]["statement_rate"]
    assert (alone["k"], alone["n"]) == (10, sum(len(r["statements"]) for r in records))
    for place, record in enumerate(records):
        record["group_id"] = f"document {place // 10}"
    together = summarise(records)["rates"]["statement_rate"]
    assert together["value"] == alone["value"]
    assert together["high"] - together["low"] > 1.5 * (alone["high"] - alone["low"])


def test_no_error_in_a_few_summaries_does_not_mean_a_rate_of_exactly_zero():
    rate = summarise(make_records("x", ["clean"] * 24))["rates"]["statement_rate"]
    assert (rate["value"], rate["low"]) == (0, 0)
    assert rate["high"] == pytest.approx(0.138, abs=5e-4)  # Wilson of 0 in 24 documents
    assert rate["method"] == "Wilson over documents"
    silent = summarise(make_records("x", ["empty"] * 24))
    assert silent["hallucination_rate"] is None and silent["interval"] == [None, None]
    omitted = silent["rates"]["omission_rate"]
    assert (omitted["value"], omitted["high"]) == (1, 1) and omitted["low"] < 0.9


def test_two_systems_are_joined_by_id_whatever_their_order():
    before = make_records("sft", ["invents"] * 8 + ["clean"] * 4)
    after = make_records("dpo", ["clean"] * 7 + ["invents"] * 2 + ["clean"] * 3)
    comparison = compare(before, after[::-1])
    paired = comparison["paired"]
    assert (comparison["a"], comparison["b"]) == ("sft", "dpo")
    assert (paired["n"], paired["b"], paired["c"]) == (12, 7, 1)
    assert paired["difference"] == pytest.approx(0.5)


def test_items_that_one_system_did_not_answer_are_excluded_and_counted():
    before = make_records("sft", ["invents"] * 5)
    comparison = compare(before, make_records("dpo", ["clean"] * 3 + ["empty"] * 2))
    assert (comparison["paired"]["n"], comparison["n_excluded"]) == (3, 2)
    assert compare(before, make_records("dpo", ["empty"] * 5))["paired"] is None


def test_systems_on_different_items_are_not_compared():
    before = make_records("sft", ["clean"] * 5)
    for first, count in ((before, 4), (before + before[:1], 5)):
        with pytest.raises(ValueError, match="same items"):
            compare(first, make_records("dpo", ["clean"] * count))


def test_the_comparisons_are_declared_and_each_arm_meets_sft_and_dpo():
    systems = ("base", "sft", "dpo", "arm")
    summary = build_summary([r for name in systems for r in make_records(name, ["clean"] * 3)])
    found = [f"{c['a']} {c['b']}" for c in summary["comparisons"]]
    assert found == ["base sft", "sft dpo", "sft arm", "arm dpo"]
    assert list(summary["systems"]) == list(systems)


def test_several_systems_are_tested_at_once_and_each_comparison_counts_among_all():
    records = make_records("base", ["clean"] * 12)
    records += make_records("sft", ["invents"] * 6 + ["clean"] * 6)
    records += make_records("dpo", ["clean"] * 11 + ["empty"])
    summary = build_summary(records)
    found = summary["all_systems"]
    assert (found["n"], found["n_excluded"]) == (11, 1) and found["p"] < 0.01
    first, second = (c["paired"] for c in summary["comparisons"])
    assert first["p"] == second["p"] == pytest.approx(2 / 2**6)  # 6 to 0
    assert first["p_holm"] == second["p_holm"] == pytest.approx(2 * first["p"])
    said = " ".join(result_sentences(summary))
    assert "All 3 systems at once, on the 11 items" in said
    assert said.count("no difference that this n can show") == 2


def test_cochrans_q_of_two_systems_is_mcnemars_chi_square_and_of_equal_ones_nothing():
    a, b = np.random.default_rng(0).random((2, 60)) < [[0.5], [0.3]]
    table = [[sum(a & b), sum(a & ~b)], [sum(~a & b), sum(~a & ~b)]]
    plain = mcnemar(table, exact=False, correction=False)
    found = compare_together(pd.DataFrame({"sft": a, "dpo": b}))
    assert (found["q"], found["p"]) == pytest.approx((plain.statistic, plain.pvalue))
    same = compare_together(pd.DataFrame({"base": a, "sft": a, "dpo": a}))
    assert (same["q"], same["p"]) == (0, 1)


def test_style_groups_are_reported_apart():
    groups = ["seen"] * 6 + ["held_out"] * 6
    summary = build_summary(make_records("sft", ["clean"] * 6 + ["invents"] * 6, groups))
    wrong = {style: found["sft"]["hallucinated"] for style, found in summary["by_style"].items()}
    assert wrong == {"seen": 0, "held_out": 6}


# --- guardrails and sentences ---------------------------------------------------------------


def summary_of(before: list[str], after: list[str]) -> dict:
    return build_summary(make_records("sft", before) + make_records("dpo", after))


@pytest.mark.parametrize(
    ("after", "name"),
    [(["short"] * 40, "omission_rate"), (["clean"] * 36 + ["empty"] * 4, "answer_rate"),
     (["clean"] * 20 + ["garbage"] * 20, "answer_rate"), (["empty"] * 40, "mean_words")],
)  # fmt: skip
def test_a_rate_bought_with_less_text_turns_a_guardrail_red(after, name):
    summary = summary_of(["invents"] * 40, after)
    red = {entry["name"] for entry in summary["guardrails"] if not entry["ok"]}
    assert name in red
    warnings = [s for s in result_sentences(summary) if s.startswith("GUARDRAIL")]
    assert len(warnings) == len(red)
    assert all("bought" in s for s in warnings)


def test_guardrails_hold_when_nothing_was_paid_and_unreadable_statements_turn_one_red():
    before, after = (make_records(name, ["clean"] * 40) for name in ("sft", "dpo"))
    summary = build_summary(before + after)
    assert all(g["ok"] for g in summary["guardrails"])
    assert any("Guardrails sft -> dpo: held (left" in s for s in result_sentences(summary))
    for record in after:
        record["n_unparsed"] += 1
        record["n_statements"] += 1
    red = [g["name"] for g in build_summary(before + after)["guardrails"] if not g["ok"]]
    assert red == ["unparsed_statement_rate"]


def test_sentences_carry_counts_intervals_b_and_c_and_p():
    summary = summary_of(["invents"] * 30 + ["clean"] * 20, ["invents"] * 5 + ["clean"] * 45)
    text = "\n".join(result_sentences(summary))
    assert "sft: 30 of 50 answered summaries (60 %, 46-72 %) hold at least one" in text
    assert "95 % Wilson interval" in text
    assert "b = 25 hallucinated only under sft, c = 0 only under dpo" in text
    assert "changes by -50.0 points (" in text and "Holm) p < 0.001: a difference" in text
    assert "is small" not in text


def test_a_small_n_says_what_it_cannot_show():
    summary = summary_of(["invents"] * 6 + ["clean"] * 4, ["invents"] * 2 + ["clean"] * 8)
    text = "\n".join(result_sentences(summary))
    assert "p = 0.125: no difference that this n can show" in text
    assert "n = 10 is small: after 6 of 10 summaries (60 %, 31-83 %)" in text
    assert "fewer than 6 changed items" in say_small_n(10) and "about 36 items" in say_small_n(10)


def test_the_headline_never_shows_a_rate_without_count_unit_and_interval():
    summary = summary_of(["invents"] * 6 + ["clean"] * 4, ["empty"] * 10)
    rows = headline_rows(summary)
    assert rows[0]["hallucinated"] == "6 of 10 answered summaries (60 %, 31-83 %)"
    assert rows[1]["hallucinated"] == "not measured"
    assert rows[1]["answered"] == "0 of 10"
    assert "facts of the note (0 %, 0-" in rows[0]["left out"]
    said = " ".join(result_sentences(summary))
    assert "dpo: none of 10 summaries could be read" in said and "nothing can be compared" in said


def test_no_change_is_not_minus_nothing():
    same = "\n".join(result_sentences(summary_of(["invents"] * 4, ["invents"] * 4)))
    assert "changes by +0.0 points" in same
    worse = "\n".join(result_sentences(summary_of(["clean"] * 10, ["invents"] + ["clean"] * 9)))
    assert "changes by +10.0 points" in worse


def test_changed_items_are_sorted_by_what_happened():
    before = make_records("sft", ["invents", "invents", "clean", "clean", "clean"])
    after = make_records("dpo", ["clean", "invents", "invents", "clean", "empty"])
    found = find_changed_items(before + after, "sft", "dpo")
    kinds = ["fixed", "both_bad", "broken", "both_good", "unanswered"]
    assert found == {kind: [note.id] for kind, note in zip(kinds, NOTES[:5], strict=True)}


# --- marked text ----------------------------------------------------------------------------


def test_marked_statements_are_escaped_labelled_and_underlined():
    text = "Takes <b>x</b> & y."
    marked = highlight_statements(text, [
        {"text": "<b>x</b> & y", "start": 6, "end": 18, "kind": "medications",
         "verdict": "not_in_note", "evidence": '"quoted"'},
    ])  # fmt: skip
    assert "<b>x</b>" not in marked and "&lt;b&gt;x&lt;/b&gt; &amp; y" in marked
    assert "[not in the note]" in marked and "underline dashed" in marked
    assert "&quot;quoted&quot;" in marked


def test_a_verdict_of_another_text_is_refused():
    said = {"text": "xyz", "start": 0, "end": 3, "kind": "k", "verdict": "supported"}
    with pytest.raises(DataError, match="is not at 0-3"):
        highlight_statements("abcdef", [said])


# --- degenerate text ------------------------------------------------------------------------


ODD = ["", " \n\t ", "Smoking", "Smoking: 90 pack-years. " * 60, "ba ba ba. " * 200,
       "Курит. 患者は喫煙者です。 المريض مدخن", "," * 500]  # fmt: skip


@pytest.mark.parametrize("detector", ["facts", "entities"])
@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:9]))
def test_no_rate_counts_more_than_there_is_whatever_the_model_writes(text, detector):
    records = make_records("base", [text] * 5 + ["clean"], detector=detector)
    figures = summarise(records)
    for rate in filter(None, figures["rates"].values()):
        assert 0 <= rate["k"] <= rate["n"] and 0 <= rate["low"] <= rate["high"] <= 1
    assert figures["rates"]["suspect_rate@summary"]["n"] == 6
    assert result_sentences(build_summary(records))


def test_a_summary_with_many_unreadable_statements_is_suspect_once():
    records = make_records("base", ["clean"] * 10)
    records[0]["n_unparsed"] = records[0]["n_statements"] = 37
    assert summarise(records)["rates"]["suspect_rate@summary"]["k"] == 1

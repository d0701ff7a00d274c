"""The one page: what it says, that red is red, and that nothing in a text becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from test_evaluation import INVENTED, NOTES, make_records, write

from hallulib.evaluation.metrics import build_summary, group_by_system
from hallulib.evaluation.page import build_blocks, choose_shown, guardrail_rows, write_pages
from hallulib.evaluation.texts import describe_lengths, measure_texts, measure_vocabulary

pytestmark = pytest.mark.unit


def make_generations(system: str, hows: list[str]) -> list[dict]:
    return [
        {"id": note.id, "system": system, "text": write(note, how), "context": note.text,
         "reference": write(note, "clean"), "reference_logp": -6.0, "reference_hits": 1,
         "reference_tokens": 3}
        for note, how in zip(NOTES, hows, strict=False)
    ]  # fmt: skip


def write_page(folder, before: list[str], after: list[str], systems=("sft", "dpo")):
    hows = dict(zip(systems, (before, after), strict=True))
    records = [r for name, how in hows.items() for r in make_records(name, how)]
    generations = [g for name, how in hows.items() for g in make_generations(name, how)]
    texts = {name: measure_texts(rows) for name, rows in group_by_system(generations).items()}
    summary = build_summary(records) | {"recipe": "tiny-cpu", "texts": texts}
    write_pages(folder, summary, records, generations)
    return (folder / "report.html").read_text("utf-8"), (folder / "report.md").read_text("utf-8")


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in order; collects the names of tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_both_pages_hold_rates_counts_unit_interval_b_c_and_p(tmp_path):
    pages = write_page(tmp_path, ["invents"] * 30 + ["clean"] * 20, ["clean"] * 50)
    for page in pages:
        assert "30 of 50 (60 %, 46-72 %)" in page and "answered summaries" in page
        assert "b: fixed" in page and "c: newly wrong" in page and "exact McNemar" in page
        assert "Guardrails: all held." in page and "RED" not in page
        assert "ROUGE-L with the reference" in page and "7.39 (7.39-7.39)" in page  # exp(6 / 3)
        assert "this is not truth" in page


def test_a_rate_bought_with_emptiness_is_red_in_words_and_in_colour(tmp_path):
    html, markdown = write_page(tmp_path, ["invents"] * 40, ["clean"] * 30 + ["empty"] * 10)
    assert 'class="red" role="status"' in html and '<td class="red">100 % to 75 %: RED</td>' in html
    assert "RED guardrails: " in markdown and ": RED |" in markdown
    assert "summaries with an answer (sft to dpo)" in markdown
    assert "bought with it" in html


def test_a_small_n_is_said_on_the_page(tmp_path):
    for page in write_page(tmp_path, ["invents"] * 6 + ["clean"] * 4, ["clean"] * 10):
        assert "n = 10 is small" in page


def test_changed_items_stand_side_by_side_with_the_statement_marked_and_the_evidence(tmp_path):
    html, markdown = write_page(tmp_path, ["invents", "clean"], ["clean", "invents"])
    assert "fixed: hallucinated only before: 1" in html
    assert f"{NOTES[0].id}: fixed" in html and f"{NOTES[1].id}: broken" in html
    wrong = INVENTED.removeprefix(" Smoking: ").removesuffix(".")
    assert f"**{wrong}** [" in markdown
    assert html.count("<mark") > 2 and wrong in html
    smoking = NOTES[0].facts.get("smoking")
    said = "has &quot;" if smoking else "the note says nothing on it"
    assert said in html


def test_the_html_is_well_formed_and_fetches_and_runs_nothing(tmp_path):
    html, _ = write_page(tmp_path, ["invents"] * 12, ["clean"] * 8 + ["empty"] * 4)
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert not parser.seen & {"script", "link", "iframe", "img"} and "http" not in html


def test_markup_in_a_text_stays_text(tmp_path):
    records = make_records("sft", ["invents"]) + make_records("dpo", ["clean"])
    generations = make_generations("sft", ["invents"]) + make_generations("dpo", ["clean"])
    for row in generations:
        row["context"] = "<script>alert(1)</script> & BP < 90"
    summary = build_summary(records) | {"recipe": "a<b"}
    write_pages(tmp_path, summary, records, generations)
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text("utf-8")
        assert "<script" not in page and "&lt;script&gt;" in page and "BP &lt; 90" in page


def test_markup_in_a_name_stays_text(tmp_path):
    html, _ = write_page(tmp_path, ["clean"] * 3, ["clean"] * 3, systems=("sft", "<b>odd"))
    assert "<b>odd" not in html and "&lt;b&gt;odd" in html


def test_a_page_without_a_comparison_still_stands():
    summary = build_summary(make_records("base", ["clean"] * 5)) | {"recipe": "r"}
    assert choose_shown(summary) == ("", "")
    assert guardrail_rows(summary) == []
    kinds = [kind for kind, _ in build_blocks(summary, [], [])]
    assert "item" not in kinds and kinds.count("table") == 3


def test_perplexity_and_token_accuracy_are_of_the_references_that_could_be_scored():
    rows = make_generations("x", ["clean"] * 4)
    rows[0] |= {"reference_logp": None, "reference_hits": None, "reference_tokens": None}
    found = measure_texts(rows)
    assert found["perplexity"]["value"] == pytest.approx(2.71828**2, rel=1e-4)
    assert found["perplexity"]["n"] == 3
    assert found["token_accuracy"]["value"] == pytest.approx(1 / 3)
    assert measure_texts(rows[:1])["perplexity"] is None


def test_overlap_is_one_for_the_reference_itself_and_falls_to_zero_for_silence():
    same, silent = measure_texts(make_generations("x", ["clean"] * 4)), measure_texts(
        make_generations("x", ["empty"] * 4)
    )
    assert {round(v["value"], 6) for v in same["overlap"].values()} == {1.0}
    assert {v["value"] for v in silent["overlap"].values()} == {0.0}
    assert measure_texts([{"text": "a", "reference": " "}])["overlap"] is None


def test_vocabulary_and_length_by_hand():
    found = measure_vocabulary(["a b a b", "a c"])
    assert (found["words"], found["distinct"]) == (6, 3)
    assert found["distinct_pairs"] == 3 / 4  # ab ba ab, ac
    assert found["mattr"] == 3 / 6
    assert measure_vocabulary([""])["mattr"] is None
    assert describe_lengths([1, 2, 3])["p50"] == 2 and describe_lengths([1, 2, 3])["mean"] == 2


def test_rich_words_in_a_window_do_not_fall_with_length():
    text = " ".join(f"w{i % 60}" for i in range(600))
    assert measure_vocabulary([text])["mattr"] == 1.0
    assert measure_vocabulary([text])["distinct"] == 60

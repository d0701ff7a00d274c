"""The one page: what it says, that red is red, and that nothing in a text becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from test_evaluation import INVENTED, NOTES, make_records, write

from hallulib.evaluation import build_summary
from hallulib.evaluation.pages import write_report
from hallulib.evaluation.texts import measure_texts

pytestmark = pytest.mark.unit


def make_generations(system: str, hows: list[str]) -> list[dict]:
    return [
        {"id": note.id, "system": system, "text": write(note, how), "context": note.text,
         "reference": write(note, "clean"), "reference_logp": -6.0, "reference_hits": 1,
         "reference_tokens": 3}
        for note, how in zip(NOTES, hows, strict=False)
    ]  # fmt: skip


def write_page(folder, before: list[str], after: list[str], arm: str = "", **changes) -> str:
    hows = {"sft": before, "dpo": after} | ({arm: before} if arm else {})
    records = [r for name, how in hows.items() for r in make_records(name, how)]
    written = {
        name: [g | changes for g in make_generations(name, how)] for name, how in hows.items()
    }
    texts = {name: measure_texts(own) for name, own in written.items()}
    summary = build_summary(records) | {"recipe": "a<b", "texts": texts}
    write_report(folder / "report.html", summary, records, sum(written.values(), []))
    return (folder / "report.html").read_text("utf-8")


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


def test_the_page_holds_rates_counts_unit_interval_b_c_and_p(tmp_path):
    page = write_page(tmp_path, ["invents"] * 30 + ["clean"] * 20, ["clean"] * 50)
    assert "30 of 50 answered summaries (60 %, 46-72 %)" in page
    assert "b: fixed" in page and "c: newly wrong" in page and "exact McNemar" in page
    assert "p &lt; 0.001" in page and "-60.0 points (95 %: " in page
    assert "Guardrails: all held." in page and "RED" not in page
    assert "ROUGE-L" in page and "7.39 (7.39-7.39)" in page  # exp(6 / 3)
    assert "this is not truth" in page


def test_a_rate_bought_with_emptiness_is_red_in_words_and_in_colour(tmp_path):
    page = write_page(tmp_path, ["invents"] * 30, ["clean"] * 21 + ["empty"] * 9)
    assert '<p class="red" role="status">' in page and "<td>100 % to 70 %</td>" in page
    assert '<td class="red">RED</td>' in page
    assert "summaries with an answer (sft to dpo)" in page
    assert "bought with it" in page and "n = 30 is small" in page


def test_changed_items_stand_side_by_side_with_the_statement_marked_and_the_evidence(tmp_path):
    page = write_page(tmp_path, ["invents", "clean"], ["clean", "invents"])
    assert f"fixed: hallucinated only before: 1 ({NOTES[0].id})" in page
    fixed, broken = page.index(f"<b>{NOTES[0].id}</b>"), page.index(f"<b>{NOTES[1].id}</b>")
    assert page.index("hallucinated only before</summary>") < fixed < broken
    wrong = INVENTED.removeprefix(" Smoking: ").removesuffix(".")
    assert f"<li><b>{wrong}</b> (" in page and page.count("<mark") > 2
    smoking = NOTES[0].facts.get("smoking")
    assert ("has &#34;" if smoking else "the note says nothing on it") in page


def test_the_html_is_well_formed_and_fetches_and_runs_nothing(tmp_path):
    parser = Balanced()
    page = write_page(tmp_path, ["invents"] * 12, ["clean"] * 8 + ["empty"] * 4)
    parser.feed(page)
    assert parser.open == []
    assert not parser.seen & {"script", "link", "iframe", "img"} and "http" not in page


def test_markup_in_a_text_or_a_name_stays_text(tmp_path):
    page = write_page(
        tmp_path, ["invents"], ["clean"], "<b>odd", context="<script>alert(1)</script> & BP < 90"
    )
    assert "<script" not in page and "&lt;script&gt;" in page and "BP &lt; 90" in page
    assert "<b>odd" not in page and "&lt;b&gt;odd" in page
    assert "<title>Evaluation of a&lt;b</title>" in page


def test_perplexity_and_token_accuracy_are_of_the_references_that_could_be_scored():
    first, *others = make_generations("x", ["clean"] * 4)
    unscored = {name: value for name, value in first.items() if "reference_" not in name}
    found = measure_texts([unscored, *others])
    assert found["perplexity"]["value"] == pytest.approx(2.71828**2, rel=1e-4)
    assert found["perplexity"]["n"] == 3
    assert found["token_accuracy"]["value"] == pytest.approx(1 / 3)
    assert measure_texts([unscored])["perplexity"] is None


def test_overlap_is_one_for_the_reference_itself_and_falls_to_zero_for_silence():
    for how, overlap in (("clean", 1), ("empty", 0)):
        found = measure_texts(make_generations("x", [how] * 4))["overlap"]
        assert {round(v["value"], 6) for v in found.values()} == {overlap}
    assert measure_texts([{"text": "a", "reference": " "}])["overlap"] is None


def measure_words(*texts: str) -> dict:
    found = measure_texts([{"text": text, "reference": ""} for text in texts])
    return found["vocabulary"] | found["words"]


def test_vocabulary_and_length_by_hand():
    found = measure_words("a b a b", "a c")
    assert (found["words"], found["distinct"]) == (6, 3)
    assert found["distinct_pairs"] == 3 / 4  # ab ba ab, ac
    assert found["mattr"] == 3 / 6
    assert (found["p0"], found["p50"], found["p100"]) == (2, 3, 4)
    assert measure_words("")["mattr"] is None and measure_words("")["distinct_pairs"] is None
    # Rich words in a window do not fall with length, and repetition does.
    rich = measure_words(" ".join(f"w{i % 60}" for i in range(600)))
    assert (rich["mattr"], rich["distinct"]) == (1.0, 60)
    assert measure_words("ba " * 600)["distinct_pairs"] < 0.01

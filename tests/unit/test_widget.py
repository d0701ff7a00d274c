"""The widget's logic, driven by its buttons, keys and fields; no browser."""

import re

import pytest
from test_session import make_rows, open_at

from hallulib.assessment.log import ERROR_TYPES, Log
from hallulib.assessment.queue import mark_terms
from hallulib.assessment.scripted import Judged, explain_grades, judge_practice, open_practice
from hallulib.assessment.widget import AssessmentWidget
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit


def open_widget(folder, quick=False, suggest=None, **changes):
    return AssessmentWidget(open_at(folder, **changes), quick=quick, suggest=suggest)


def press(widget, *keys):
    """Press the buttons that are shown with these keys."""
    for key in keys:
        shown = [b["name"] for b in widget.buttons.values() if b["key"] == key and b["shown"]]
        widget.press(*shown)


def write(widget, field, text):
    widget.receive({"field": field, "text": text, "place": widget.place})


def graded(widget):
    return widget.session.log.progress()["graded"]


def verdicts(widget, *places):
    return [widget.session.log.items[place]["verdict"] for place in places]


def visible(widget):
    """All that the widget shows and says."""
    return " ".join([*widget.regions.values(), *widget.message])


def test_keys_grade_sentence_by_sentence_and_enter_saves_and_goes_on(tmp_path):
    widget = open_widget(tmp_path)
    first = widget.session.current
    press(widget, "1", "2", "d", "a", "Enter")
    assert verdicts(widget, 0) == ["hallucinated"]
    labels = widget.session.log.items[0]["labels"].values()
    assert [tuple(label.values()) for label in labels] == [
        ("supported", None, None), ("hallucinated", "detail", "major"),
    ]  # fmt: skip
    assert widget.session.current != first and "Item 2 of 16" in visible(widget)


def test_every_sentence_grade_is_on_the_disk_before_the_item_is_saved(tmp_path):
    widget = open_widget(tmp_path)
    widget.press("verdict_supported")
    assert '"verdict": "supported"' in widget.session.path.read_text()
    again = open_widget(tmp_path)  # a new kernel
    assert list(again.labels) == ["s1"] and again.selected == "s2" and graded(again) == 0


def test_undo_takes_back_one_sentence_then_the_one_before(tmp_path):
    widget = open_widget(tmp_path)
    assert widget.buttons["go_undo"]["why_not"]
    press(widget, "1", "3", "Enter", "u")
    assert graded(widget) == 0 and list(widget.labels) == ["s1", "s2"]
    assert widget.message == ["status", "Taken back: grade on item 1."]
    press(widget, "u")
    assert list(widget.labels) == ["s1"] and widget.selected == "s2"
    press(widget, "u", "u")
    assert not widget.labels and "nothing to undo" in visible(widget)


def test_a_whole_summary_is_graded_by_one_key_in_quick_mode(tmp_path):
    widget = open_widget(tmp_path, quick=True)
    assert "General knowledge" not in visible(widget) and "type_" not in visible(widget)
    press(widget, "2", "3")
    assert verdicts(widget, 0, 1) == ["hallucinated", "unsure"]
    press(widget, "q")
    assert not widget.quick and "not graded yet" in visible(widget)


def test_what_makes_no_sense_is_refused_aloud(tmp_path):
    widget = open_widget(tmp_path)
    press(widget, "d")
    assert "only for a hallucinated sentence" in widget.message[1]
    assert not widget.session.log.actions
    press(widget, "2", "f", "4")  # another verdict forgets the type of the one before
    assert widget.labels["s1"]["verdict"] == "general_knowledge" and not widget.labels["s1"]["type"]
    press(widget, "ArrowUp", "Enter")
    assert widget.message[0] == "alert" and "Not graded yet: s2" in widget.message[1]
    assert widget.selected == "s2" and graded(widget) == 0


def test_what_was_meant_for_another_item_is_left_undone(tmp_path):
    widget = open_widget(tmp_path, quick=True)
    meant = {"act": "verdict_supported", "place": widget.place}
    widget.receive(meant)
    widget.receive(meant)  # sent before the next item was seen
    assert graded(widget) == 1
    assert widget.answered == 3  # yet every message is answered


def test_skip_goes_on_and_the_skipped_are_offered_at_the_end(tmp_path):
    widget = open_widget(tmp_path, quick=True, items=4, share=0)
    assert not widget.buttons["go_revisit"]["shown"]
    press(widget, "s", "1", "1", "1")
    assert "Finished" in visible(widget) and widget.buttons["verdict_supported"]["why_not"]
    press(widget, "1")
    assert "every item is done" in widget.message[1]
    press(widget, "v")
    assert "Item 1 of 4" in visible(widget) and "Skipped" in visible(widget)
    press(widget, "3")
    assert graded(widget) == 4


def test_a_line_torn_by_a_crash_is_announced_when_the_session_is_opened(tmp_path):
    widget = open_widget(tmp_path, quick=True)
    write(widget, "note", "dose?")
    press(widget, "1")
    path = widget.session.path
    path.write_bytes(path.read_bytes()[:-5])
    again = open_widget(tmp_path)
    assert again.message[0] == "alert" and "torn by a crash" in again.message[1]
    assert 'value="dose?"' in visible(again) and "0 graded" in visible(again)


def test_text_with_markup_is_shown_as_text(tmp_path):
    bad = '<script>alert(1)</script> BP < 120 & "stable".'
    rows = {place: {"context": bad, "text": bad} for place in make_rows()}
    for mode, quick in (("single", False), ("single", True), ("ab", False)):
        widget = open_widget(
            tmp_path / f"{mode}{quick}", quick, rows=rows, assessor="<b>Ann</b>", mode=mode
        )
        write(widget, "note", '"><script>')
        for html in (visible(widget), widget.static_html()):
            assert "<script" not in html and "<b>Ann" not in html
        assert "&amp;" in visible(widget) and "BP < 120" not in visible(widget)


def test_no_system_name_reaches_the_view(tmp_path):
    widget = open_widget(tmp_path, quick=True)
    while widget.session.current:
        shown = visible(widget) + widget.static_html() + str(widget.get_state())
        assert "sft" not in shown and "dpo" not in shown
        press(widget, "1")


def test_what_cannot_be_saved_is_said_and_nothing_is_counted(tmp_path):
    widget = open_widget(tmp_path, quick=True)
    open_widget(tmp_path)  # the cell is run again: the newer view has the session now
    press(widget, "1")
    assert widget.message[0] == "alert" and "opened again elsewhere" in widget.message[1]
    assert graded(widget) == 0


def test_notes_omissions_and_flags_stay_with_their_item(tmp_path):
    widget = open_widget(tmp_path)
    write(widget, "note", "dose?")
    write(widget, "omissions", "allergy; age ;")
    press(widget, "g")
    assert "1 flagged" in visible(widget) and widget.buttons["go_flag"]["pressed"]
    press(widget, "g")
    assert "flagged" not in visible(widget).lower()
    press(widget, "1", "1", "Enter")
    assert 'value="dose?"' not in visible(widget) and "allergy" not in visible(widget)
    said = widget.session.log.items[0]
    assert said["note"] == "dose?" and said["omissions"] == ["allergy", "age"]


def test_ab_mode_shows_two_summaries_and_takes_a_preference(tmp_path):
    widget = open_widget(tmp_path, mode="ab", items=4)
    assert "Summary 1" in visible(widget) and "Summary 2" in visible(widget)
    assert "verdict_supported" not in widget.buttons
    press(widget, "1", "5")
    assert [widget.session.log.items[place]["preference"] for place in (0, 1)] == [-2, 2]


def test_suggestions_are_hidden_until_asked_for_and_that_they_were_seen_is_recorded(tmp_path):
    widget = open_widget(tmp_path, suggest=lambda item, text: Judged({"s2": "detail"}))
    assert "objects" not in visible(widget)
    press(widget, "1", "h")
    assert visible(widget).count("objects (detail)") == 1
    assert visible(widget).count("detector: no objection") == 1
    press(widget, "1", "h", "Enter", "1", "1", "Enter")
    actions = Log(widget.session.path).actions
    grades = [action for action in actions if action.do in ("label", "grade")]
    assert [g.suggested for g in grades] == [False, True, True, False, False, False]


def test_no_two_buttons_share_a_key_and_every_button_shows_its_own(tmp_path):
    for mode in ("single", "ab"):
        widget = open_widget(tmp_path / mode, suggest=lambda *_: Judged(), mode=mode)
        keys = [button["key"] for button in widget.buttons.values()]
        assert all(keys) and len(keys) == len(set(keys))
        shown = re.findall(r'<button .*?class="hlw-b.*?</button>', visible(widget))
        assert len(shown) == sum(button["shown"] for button in widget.buttons.values())
        assert all("<kbd>" in html and "aria-keyshortcuts" in html for html in shown)


def test_numbers_and_terms_of_the_chosen_sentence_are_marked_in_the_note(tmp_path):
    def marked(note, sentence):
        pieces = mark_terms(note, sentence)
        assert "".join(text for text, _ in pieces) == note
        return [text for text, is_marked in pieces if is_marked]

    assert marked("BP <120/80, HR 80. Cysts on the left.", "BP 120/80, left cyst.") == [
        "BP", "120/80", "Cysts", "left",
    ]  # fmt: skip
    assert marked("It takes 2.5 mg of the drug.", "Takes 2.5 of the drug.") == ["2.5", "drug"]
    assert marked("5 and 15 mg", "1") == []  # whole numbers only
    rows = {place: row | {"context": "Takes <0.5 mg."} for place, row in make_rows().items()}
    widget = open_widget(tmp_path, rows=rows)
    assert "<mark>" not in visible(widget)
    press(widget, "ArrowDown")
    assert "&lt;<mark>0.5</mark>" in visible(widget)


def test_the_static_picture_holds_the_texts_and_labels_and_no_script(tmp_path):
    widget = open_widget(tmp_path)
    html = widget._repr_mimebundle_()[0]["text/html"]
    assert widget.session.current.sentences[0].text in html and "static picture" in html
    for button in widget.buttons.values():
        assert not button["shown"] or button["text"].replace("&", "&amp;") in html
    assert "<script" not in html and "http" not in html and "<button" not in html


def test_practice_says_what_the_key_says_is_no_assessment_and_meets_every_type(tmp_path):
    recipe = load_recipe("tiny-cpu")
    run = Run.open(tmp_path, recipe)
    session = open_practice(run, recipe, "Ann")
    widget = AssessmentWidget(session, feedback=explain_grades)
    press(widget, "1", "1", "Enter")
    assert "1 of 2 sentences as in the key" in widget.message[1]
    assert "s2 is hallucinated, detail: the note says 20 mg" in widget.message[1]
    press(widget, "2", "x", "ArrowDown", "1", "Enter")
    assert "2 of 2 sentences as in the key. Item 3" in widget.message[1]
    assert not list(run.path("assessment").glob("*.events.jsonl"))
    kinds = set()
    for item in session.items:
        assert explain_grades(item, {"labels": {}})  # there is a key for every sentence
        kinds.update(judge_practice(item.item_id, item.summaries[0]).errors.values())
    assert kinds == {*ERROR_TYPES} - {"other"}

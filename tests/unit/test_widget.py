"""The widget's logic, driven by clicking its buttons; no browser."""

from dataclasses import replace

import pytest

from hallulib.assessment.session import AssessmentSession, SessionSettings
from hallulib.assessment.widget import AssessmentWidget

pytestmark = pytest.mark.unit

SETTINGS = SessionSettings("Dr A", mode="single", items=12, repeat_share=0.25, seed=3)


def make_rows():
    return [
        {
            "id": f"n{number}",
            "system": system,
            "context": f"Note {number}: no fever.",
            "text": f"Patient {number} is well. Takes 0.5 mg ({style}).",
        }
        for number in range(9)
        for system, style in (("sft", "long"), ("dpo", "short"))
    ]


def open_widget(folder, rows=None, **changes):
    session = AssessmentSession(folder, rows or make_rows(), replace(SETTINGS, **changes))
    return AssessmentWidget(session)


def visible(widget):
    """All HTML that the widget shows."""
    parts = (widget._head, widget._panes, widget._answer, widget._message)
    return " ".join(part.value for part in parts)


def test_a_click_grades_saves_and_shows_the_next_item(tmp_path):
    widget = open_widget(tmp_path)
    first = widget.session.current
    widget.buttons["hallucinated"].click()
    assert widget.session.state.entries[0].grades[1].verdict == "hallucinated"
    assert first.summaries[0] not in widget._panes.value
    assert widget.session.current.summaries[0] in widget._panes.value
    assert "1 graded" in visible(widget) and "Item 2 of 15" in visible(widget)
    assert '"verdict":"hallucinated"' in widget.session.events_path.read_text()


def test_undo_goes_back_and_skip_goes_on(tmp_path):
    widget = open_widget(tmp_path)
    assert widget.buttons["undo"].disabled
    widget.buttons["supported"].click()
    widget.buttons["skip"].click()
    assert "1 skipped" in visible(widget) and "Item 3" in visible(widget)
    widget.buttons["undo"].click()
    widget.buttons["undo"].click()
    assert "0 graded" in visible(widget) and "Item 1 of" in visible(widget)
    assert widget.buttons["undo"].disabled


def test_a_new_kernel_shows_the_same_item_and_the_same_counts(tmp_path):
    widget = open_widget(tmp_path)
    widget.buttons["supported"].click()
    widget.note.value = "look again"
    again = open_widget(tmp_path)
    assert again.session.current == widget.session.current
    assert again.note.value == "look again" and "1 graded" in visible(again)


def test_a_line_torn_by_a_crash_is_announced_when_the_session_is_opened(tmp_path):
    widget = open_widget(tmp_path)
    widget.note.value = "dose?"
    widget.buttons["supported"].click()
    path = widget.session.events_path
    path.write_bytes(path.read_bytes()[:-5])
    again = open_widget(tmp_path)
    assert 'role="alert"' in visible(again) and "torn by a crash" in visible(again)
    assert again.note.value == "dose?" and "0 graded" in visible(again)


def test_text_with_markup_is_shown_as_text(tmp_path):
    bad = "<script>alert(1)</script> BP < 120 & stable"
    rows = [row | {"context": bad, "text": bad} for row in make_rows()]
    widget = open_widget(tmp_path, rows, assessor="<b>Ann</b>")
    widget.buttons["by_sentence"].click()
    rows_html = " ".join(row.children[0].value for row in widget.sentences.rows)
    for html in (visible(widget), widget.static_html(), rows_html):
        assert "<script" not in html and "<b>Ann" not in html
    assert visible(widget).count("BP &lt; 120 &amp; stable") == 2


def test_no_system_name_reaches_the_view(tmp_path):
    widget = open_widget(tmp_path)
    while widget.session.current:
        shown = visible(widget) + widget.static_html()
        assert "sft" not in shown and "dpo" not in shown
        widget.buttons["supported"].click()


def test_the_finished_view_offers_the_skipped_items(tmp_path):
    widget = open_widget(tmp_path, items=4, repeat_share=0)
    assert widget.buttons["revisit"].layout.display == "none"
    widget.buttons["skip"].click()
    while widget.session.current:
        widget.buttons["supported"].click()
    assert "Finished" in visible(widget) and widget.buttons["supported"].disabled
    assert widget.buttons["revisit"].layout.display == ""
    assert widget.buttons["skip"].layout.display != "none"
    widget.buttons["revisit"].click()
    assert "Item 1 of 4" in visible(widget) and "Skipped" in visible(widget)
    widget.buttons["unsure"].click()
    assert widget.session.progress.unfinished == 0


def test_sentence_grades_make_the_verdict_and_are_saved_with_type_and_severity(tmp_path):
    widget = open_widget(tmp_path)
    entry = widget.session.current
    widget.buttons["by_sentence"].click()
    first, second = widget.sentences.rows
    assert first.type.layout.display == "none"
    first.verdict.value = "general_knowledge"
    second.verdict.value = "hallucinated"
    assert second.type.layout.display == ""
    second.type.value, second.severity.value = "detail", "major"
    widget.omissions.value = "allergy; age"
    widget.sentences.save.click()
    grade = widget.session.state.entries[0].grades[1]
    assert grade.verdict == "hallucinated" and widget.session.current != entry
    assert [label.verdict for label in grade.labels] == ["general_knowledge", "hallucinated"]
    assert (grade.labels[1].type, grade.labels[1].severity) == ("detail", "major")
    assert grade.labels[1].text == entry.sentences()[1].text
    assert [omission.text for omission in grade.omissions] == ["allergy", "age"]
    assert widget.omissions.value == ""
    widget.buttons["undo"].click()
    assert widget.session.current == entry


def test_a_sentence_without_verdict_is_refused_aloud_and_what_was_chosen_stays(tmp_path):
    widget = open_widget(tmp_path)
    widget.buttons["by_sentence"].click()
    widget.sentences.rows[0].verdict.value = "supported"
    widget.sentences.save.click()
    assert 'role="alert"' in visible(widget) and "Sentence s2 has no verdict" in visible(widget)
    assert widget.sentences.rows[0].verdict.value == "supported"
    assert widget.session.progress.graded == 0
    widget.sentences.rows[1].verdict.value = "unsure"
    widget.sentences.save.click()
    assert widget.session.state.entries[0].grades[1].verdict == "unsure"
    assert "alert" not in visible(widget)


def test_what_cannot_be_saved_is_said_and_nothing_is_counted(tmp_path):
    widget = open_widget(tmp_path)
    open_widget(tmp_path)  # the cell is run again: the newer view has the session now
    widget.buttons["supported"].click()
    assert "Not saved." in visible(widget) and "opened again elsewhere" in visible(widget)
    assert widget.session.progress.graded == 0


def test_the_note_is_saved_as_soon_as_it_is_entered_and_stays_with_its_item(tmp_path):
    widget = open_widget(tmp_path)
    widget.note.value = "dose?"
    assert widget.session.current_state.note == "dose?"
    widget.buttons["supported"].click()
    assert widget.note.value == "" and widget.session.state.entries[0].note == "dose?"
    actions = [event.action for event in widget.session._log.events]
    assert actions == ["open", "note", "grade"]  # showing an empty box is not a note


def test_a_flag_is_put_on_and_taken_off(tmp_path):
    widget = open_widget(tmp_path)
    widget.buttons["flag"].click()
    assert "1 flagged" in visible(widget) and "Unflag" in widget.buttons["flag"].description
    widget.buttons["flag"].click()
    assert "flagged" not in visible(widget)


def test_ab_mode_shows_two_summaries_and_takes_a_preference(tmp_path):
    widget = open_widget(tmp_path, mode="ab", items=4)
    assert "Summary 1" in widget._panes.value and "Summary 2" in widget._panes.value
    assert "supported" not in widget.buttons and "by_sentence" not in widget.buttons
    widget.buttons["prefer_-2"].click()
    assert widget.session.state.entries[0].preference.preference == -2


def test_the_static_picture_holds_the_texts_and_labels_and_no_script(tmp_path):
    widget = open_widget(tmp_path)
    html = widget._repr_mimebundle_()["text/html"]
    assert widget.session.current.summaries[0] in html and "static picture" in html
    for name in ("supported", "hallucinated", "unsure", "skip", "undo"):
        assert widget.buttons[name].description in html
    assert "<script" not in html and "http" not in html


def test_keys_are_shown_where_they_work_and_press_the_button(tmp_path):
    pytest.importorskip("anywidget")
    widget = open_widget(tmp_path)
    assert widget.buttons["hallucinated"].description.endswith("[2]")
    widget._catcher.pressed = ["2", 1]
    widget._catcher.pressed = ["2", 2]
    assert widget.session.progress.graded == 2
    widget._catcher.pressed = ["u", 3]
    assert widget.session.progress.graded == 1
    grades = [event.verdict for event in widget.session._log.events if event.action == "grade"]
    assert grades == ["hallucinated", "hallucinated"]

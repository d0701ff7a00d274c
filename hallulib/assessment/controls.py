"""The widget's buttons: their texts, their keys, and when they can be pressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hallulib.assessment.events import ERROR_TYPES, SEVERITIES
from hallulib.assessment.render import PREFERENCE_TEXTS, VERDICT_TEXTS, Button

if TYPE_CHECKING:
    from hallulib.assessment.widget import AssessmentWidget

VERDICT_HINTS = {
    "supported": "The note says so, in whatever words",
    "hallucinated": "The note does not say so, or says otherwise",
    "unsure": "The note does not let you decide",
    "general_knowledge": "Not in the note, but true in general; counted apart",
}
TYPE_KEYS = {
    "fabrication": "f", "negation": "n", "detail": "d", "causality": "c", "contextual": "x",
    "other": "o",
}  # fmt: skip
SEVERITY_KEYS = {"minor": "i", "major": "a"}


def make_buttons(widget: AssessmentWidget) -> dict[str, Button]:
    """Every button by name, in the order shown. No two have the same key."""
    buttons: dict[str, Button] = {}

    def add(name, text, key, hint, do, **options):
        buttons[name] = Button(name, text, key, hint, do, widget.press, **options)

    if widget.session.mode == "ab":
        _add_preferences(widget, add)
    else:
        _add_grades(widget, add)
    _add_steps(widget, add)
    _add_fields(widget, add)
    return buttons


def _add_preferences(widget: AssessmentWidget, add) -> None:
    for number, (value, text) in enumerate(PREFERENCE_TEXTS.items(), start=1):
        add(f"prefer_{value}", text, str(number), "Which summary you would rather have",
            lambda value=value: widget.session.prefer(value), is_main=True)  # fmt: skip


def _add_grades(widget: AssessmentWidget, add) -> None:
    for number, (verdict, text) in enumerate(VERDICT_TEXTS.items(), start=1):
        add(f"verdict_{verdict}", text, str(number), VERDICT_HINTS[verdict],
            lambda verdict=verdict: widget.grade(verdict), is_main=True)  # fmt: skip
    for kind, hint in ERROR_TYPES.items():
        add(f"type_{kind}", kind, TYPE_KEYS[kind], hint,
            lambda kind=kind: widget.describe_error(type=kind))  # fmt: skip
    for severity, hint in SEVERITIES.items():
        add(f"severity_{severity}", severity, SEVERITY_KEYS[severity], hint,
            lambda severity=severity: widget.describe_error(severity=severity))  # fmt: skip


def _add_steps(widget: AssessmentWidget, add) -> None:
    session = widget.session
    if session.mode == "single":
        add("go_save", "Save & next", "Enter", "Save this item and show the next", widget.save,
            is_main=True)  # fmt: skip
        add("go_previous", "Previous", "ArrowUp", "The sentence before", lambda: widget.step(-1))
        add("go_next", "Next", "ArrowDown", "The next sentence", lambda: widget.step(1))
    add("go_skip", "Skip", "s", "Leave it ungraded; it counts as unfinished", session.skip)
    add("go_undo", "Undo", "u", "Take the last action back", widget.undo)
    add("go_flag", "Flag", "g", "Mark the item for discussion", lambda: widget.toggle("flag"))
    add("go_revisit", "Skipped items", "v", "Go to the first skipped item", widget.revisit)
    if session.mode == "single":
        add("go_quick", "Whole summary", "q", "One verdict for the whole summary",
            lambda: widget.toggle("quick"))  # fmt: skip
    if widget._suggest is not None and session.mode == "single":
        add("go_suggest", "Detector", "h", "Show the detector's opinion; seeing it is recorded",
            lambda: widget.toggle("suggest"))  # fmt: skip


def _add_fields(widget: AssessmentWidget, add) -> None:
    add("note", "Note", "t", "Write a free note", lambda: None, focus="note")
    if widget.session.mode == "single":
        add("omissions", "Left out", "l", "What the summary should have said; part several by ;",
            lambda: None, focus="omissions")  # fmt: skip
        add("after_omissions", "major", "m", "What is left out could change diagnosis or treatment",
            lambda: widget.toggle("major"))  # fmt: skip


def update_buttons(widget: AssessmentWidget) -> None:
    """Set what is pressed, what can be pressed and what is shown, from the session."""
    session, state, label = widget.session, widget.session.current_state, widget.current_label()
    wrong = label is not None and label.verdict == "hallucinated"
    quick = widget.quick or not widget.sentences()
    given = state.grades[1].verdict if quick and state and 1 in state.grades else None
    for name, button in widget.buttons.items():
        kind, _, value = name.partition("_")
        button.why_not = "" if state else "every item is done"
        if kind == "verdict":
            button.pressed = value == (given if quick else label and label.verdict)
            button.is_shown = not (quick and value == "general_knowledge")
        elif kind in ("type", "severity"):
            button.pressed = wrong and value == getattr(label, kind)
            button.is_shown = not quick
            if not wrong:
                button.why_not = "only for a hallucinated sentence"
    _update_steps(widget, quick)
    if session.mode == "ab" and state:
        for value in PREFERENCE_TEXTS:
            given = state.preference and state.preference.preference
            widget.buttons[f"prefer_{value}"].pressed = value == given


def _update_steps(widget: AssessmentWidget, quick: bool) -> None:
    buttons, session, state = widget.buttons, widget.session, widget.session.current_state
    buttons["go_flag"].pressed = bool(state and state.flagged)
    buttons["go_undo"].why_not = "" if session.state.last_action else "there is nothing to undo"
    buttons["go_revisit"].is_shown = bool(session.progress.skipped)
    buttons["go_revisit"].why_not = ""
    for name in ("go_save", "go_previous", "go_next"):
        if name in buttons:
            buttons[name].is_shown = not quick
    if "go_quick" in buttons:
        buttons["go_quick"].pressed = widget.quick
        buttons["after_omissions"].pressed = widget.major
    if "go_suggest" in buttons:
        buttons["go_suggest"].pressed = session.state.suggesting

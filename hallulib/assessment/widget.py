"""The assessment widget: a thin view of a session. It holds no state that the session does not.

    widget = AssessmentWidget(open_session(run, recipe))
    display(widget)

`widget.buttons["supported"].click()` does what a click does, without a browser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from hallulib.assessment import render
from hallulib.assessment.events import SEVERITIES, Omission
from hallulib.assessment.sentences import SentencePanel
from hallulib.assessment.session import AssessmentSession
from hallulib.errors import HallulibError

_TOOLTIPS = {
    "supported": "Every statement is in the note",
    "hallucinated": "At least one statement is not in the note, or against it",
    "unsure": "You cannot tell",
    "skip": "Leave it ungraded; it counts as unfinished",
    "undo": "Take the last action back",
    "flag": "Mark the item for discussion",
    "by_sentence": "Grade each sentence with type and severity",
    "revisit": "Go to the first skipped item",
}


class AssessmentWidget(widgets.VBox):
    """Source and summary side by side, a button per answer, undo, skip, flag, note.

    `buttons` maps an action to its button, `note` is the text box, `sentences` the optional panel.
    A label shows its key.
    """

    def __init__(self, session: AssessmentSession) -> None:
        self.session = session
        self.shortcuts = self._choose_shortcuts()
        self.buttons: dict[str, widgets.Button] = {}
        self._filling = False  # while the view is being filled, changed boxes are not input
        self._head, self._panes, self._answer = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._message = widgets.HTML()
        self.note = widgets.Text(description="Note", continuous_update=False, layout=_wide())
        self.omissions = widgets.Text(description="Left out", placeholder="a; b", layout=_wide())
        self.omission_severity = widgets.Dropdown(options=list(SEVERITIES), layout=_auto())
        self.sentences = SentencePanel(self._grade_by_sentence)
        self.note.observe(self._save_note, names="value")
        super().__init__(
            [widgets.HTML(render.render_style()), *self._build()],
            layout=widgets.Layout(width="100%"),
        )
        self.add_class("hlw")
        self._show(" ".join(session.warnings), is_alert=bool(session.warnings))

    # --- building -------------------------------------------------------------------------------

    def _choose_shortcuts(self) -> dict[str, str]:
        answers = self._answers()
        numbered = {name: str(number) for number, name in enumerate(answers, start=1)}
        return numbered | {"skip": "s", "undo": "u", "flag": "f"}

    def _answers(self) -> dict[str, tuple[str, Callable[[], None]]]:
        """Answer -> (text, what it does)."""
        session = self.session
        if session.mode == "ab":
            return {
                f"prefer_{value}": (text, lambda value=value: session.prefer(value))
                for value, text in render.PREFERENCE_TEXTS.items()
            }
        return {
            verdict: (text, lambda verdict=verdict: self._grade(verdict))
            for verdict, text in render.VERDICT_TEXTS.items()
        }

    def _build(self) -> list[widgets.Widget]:
        answers = [self._add_button(n, text, do) for n, (text, do) in self._answers().items()]
        for button in answers:
            button.add_class("hlw-main")
        others = [
            self._add_button("skip", "↷ Skip", self.session.skip),
            self._add_button("undo", "↶ Undo", self.session.undo),
            self._add_button("flag", "⚑ Flag", self._toggle_flag),
            self._add_button("revisit", "Skipped items", self._revisit),
        ]
        rows = [self._head, self._panes, self._answer, _row(answers), _row(others), self.note]
        if self.session.mode == "single":
            others.append(self._add_button("by_sentence", "By sentence …", self._toggle_sentences))
            rows[4] = _row(others)
            rows += [_row([self.omissions, self.omission_severity]), self.sentences]
        if self.shortcuts:
            from hallulib.assessment.keys import KeyCatcher

            self._catcher = KeyCatcher(bound=list(self.shortcuts.values()))
            self._catcher.observe(self._press, names="pressed")
            rows.append(self._catcher)
        return [*rows, self._message]

    def _add_button(self, name: str, text: str, action: Callable[[], Any]) -> widgets.Button:
        button = widgets.Button(
            description=self._label(name, text), tooltip=_TOOLTIPS.get(name, text), layout=_auto()
        )
        button.on_click(lambda _: self._do(action))
        self.buttons[name] = button
        return button

    def _label(self, name: str, text: str) -> str:
        return f"{text} [{self.shortcuts[name]}]" if name in self.shortcuts else text

    # --- acting ---------------------------------------------------------------------------------

    def _do(self, action: Callable[[], Any]) -> None:
        """Run one action of the session and show the outcome, also when it was refused."""
        try:
            action()
        except HallulibError as error:
            problem = f"Not saved. {error.what} {error.next_step}"
            self._show(problem, is_alert=True, keep_input=True)
        else:
            self._show("")

    def _press(self, change: dict) -> None:
        key = change["new"][0]
        name = next(name for name, own in self.shortcuts.items() if own == key)
        if not self.buttons[name].disabled:
            self.buttons[name].click()

    def _grade(self, verdict: str) -> None:
        self.session.grade(verdict, omissions=self._read_omissions())

    def _grade_by_sentence(self) -> None:
        def grade() -> None:
            grades = self.sentences.read()
            self.session.grade(self.sentences.verdict(grades), grades, self._read_omissions())

        self._do(grade)

    def _read_omissions(self) -> list[Omission]:
        texts = [text.strip() for text in self.omissions.value.split(";")]
        severity = self.omission_severity.value
        return [Omission(text=text, severity=severity) for text in texts if text]

    def _save_note(self, change: dict) -> None:
        if not self._filling:
            self._do(lambda: self.session.note(change["new"]))

    def _toggle_flag(self) -> None:
        state = self.session.current_state
        self.session.flag(state is None or not state.flagged)

    def _toggle_sentences(self) -> None:
        self.sentences.is_open = not self.sentences.is_open

    def _revisit(self) -> None:
        states = self.session.state.entries
        self.session.go_to(next(i for i, state in enumerate(states) if state.skipped))

    # --- showing --------------------------------------------------------------------------------

    def _show(self, message: str, is_alert: bool = False, keep_input: bool = False) -> None:
        session = self.session
        entry, state, progress = session.current, session.current_state, session.progress
        self._filling = True
        try:
            self._head.value = render.render_head(session)
            self._panes.value = render.render_panes(entry)
            self._answer.value = render.render_answer(state)
            if not keep_input:
                self.note.value = state.note if state else ""
                self.omissions.value = ""
                self.sentences.fill(entry, state)
        finally:
            self._filling = False
        for name in (*self._answers(), "skip", "flag", "by_sentence"):
            if name in self.buttons:
                self.buttons[name].disabled = entry is None
        flagged = bool(state and state.flagged)
        self.buttons["flag"].description = self._label("flag", "⚑ Unflag" if flagged else "⚑ Flag")
        self.buttons["undo"].disabled = session.state.last_action is None
        self.buttons["revisit"].layout.display = "" if progress.skipped else "none"
        self._message.value = render.render_message(message, is_alert) if message else ""

    def static_html(self) -> str:
        """The widget as it looks now, as HTML without scripts: for executed notebooks."""
        shown = [button for button in self.buttons.values() if button.layout.display != "none"]
        return render.render_static(self.session, [button.description for button in shown])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle | {"text/html": self.static_html()}


def _wide() -> widgets.Layout:
    return widgets.Layout(width="auto", flex="1 1 auto")


def _auto() -> widgets.Layout:
    return widgets.Layout(width="auto")


def _row(children: list[widgets.Widget]) -> widgets.HBox:
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap"))

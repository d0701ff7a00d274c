"""The assessment widget: a thin view of a session. It holds no state that the session does not,
save which sentence is chosen.

    AssessmentWidget(open_session(run, recipe))

`widget.buttons["verdict_supported"].click()` and `widget.press_key("1")` do what they do in the
browser, without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anywidget
import traitlets

from hallulib.assessment.controls import make_buttons, update_buttons
from hallulib.assessment.events import Omission, SentenceGrade
from hallulib.assessment.queue import Entry, Sentence
from hallulib.assessment.render import Opinion, Picture, read_asset, render_regions, render_static
from hallulib.assessment.session import AssessmentSession
from hallulib.assessment.simulate import Judge
from hallulib.assessment.state import EntryState
from hallulib.errors import HallulibError, SessionError

LABELS = {
    "assess": "Assessment of summaries", "adjudicate": "Adjudication", "practice": "Practice",
}  # fmt: skip
UNANSWERED = (
    "No answer from the kernel: the last action may not be saved. Run the notebook cell of this "
    "widget again; everything saved before is kept."
)


class AssessmentWidget(anywidget.AnyWidget):
    """Source and summary side by side; grades by sentence, or by whole summary with `quick`.

    `suggest` gives the detector's opinion, hidden until asked for; `opinions` what others said of
    an entry (adjudication); `feedback` is said of a graded one (practice).
    """

    _esm, _css = read_asset("widget.js"), read_asset("widget.css")
    regions = traitlets.Dict().tag(sync=True)
    shortcuts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    place = traitlets.Int(allow_none=True).tag(sync=True)
    message = traitlets.List(default_value=["status", ""]).tag(sync=True)
    answered = traitlets.Int(0).tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    unanswered = traitlets.Unicode(UNANSWERED).tag(sync=True)

    def __init__(
        self,
        session: AssessmentSession,
        quick: bool = False,
        suggest: Judge | None = None,
        opinions: Callable[[Entry], Sequence[Opinion]] | None = None,
        feedback: Callable[[Entry, EntryState], str] | None = None,
    ) -> None:
        self.session, self.quick, self.major = session, quick, False
        self._suggest, self._opinions, self._feedback = suggest, opinions, feedback
        self.selected = ""
        self.buttons = make_buttons(self)
        keys = [button.key for button in self.buttons.values() if button.key]
        super().__init__(shortcuts=keys, label=LABELS[session.header.role])
        self._choose_first()
        self._show(" ".join(session.warnings), is_alert=bool(session.warnings))
        self.on_msg(lambda _, content, buffers: self.receive(content))

    # --- what the browser sends -----------------------------------------------------------------

    def receive(self, content: dict[str, Any]) -> None:
        """One message: a button, a key or a text field. What was meant for an item that is no
        longer shown (a double click on "save") is left undone."""
        if content.get("place") != self.place:
            self._show("")
        elif "key" in content:
            self.press_key(content["key"])
        elif "field" in content:
            self.enter(content["field"], content["text"])
        elif content["act"].startswith("sentence:"):
            self.choose_sentence(content["act"].removeprefix("sentence:"))
        else:
            self.press(content["act"])

    def press_key(self, key: str) -> None:
        """What pressing a key does; a key without a button here does nothing."""
        own = [b for b in self.buttons.values() if b.key == key and b.is_shown]
        if own:
            self.press(own[0].name)
        else:
            self._show("")

    def press(self, name: str) -> None:
        """Do what a button does, and show the outcome, also when it was refused."""
        button = self.buttons[name]
        if button.why_not:
            self._show(f"{button.text}: {button.why_not}")
        else:
            self._do(button.do)

    def enter(self, field: str, text: str) -> None:
        """Take in the text of "note" or "omissions" (several are parted by ";")."""
        if field == "note":
            self._do(lambda: self.session.note(text))
        else:
            self._do(lambda: self._save_omissions(text))

    # --- actions --------------------------------------------------------------------------------

    def choose_sentence(self, statement_id: str) -> None:
        """Choose the sentence to grade."""
        self.selected = statement_id
        self._show("")

    def step(self, by: int) -> None:
        """Choose the sentence `by` places on, staying within the summary."""
        ids = [s.statement_id for s in self.sentences()]
        self.selected = ids[min(max(ids.index(self.selected) + by, 0), len(ids) - 1)]

    def grade(self, verdict: str) -> str | None:
        """The verdict on the chosen sentence, or in quick mode on the whole summary."""
        if self.quick or not self.sentences():
            self._finish(verdict)
            return None
        old = self.current_label()
        same = old is not None and old.verdict == verdict
        self._save_label(verdict, old.type if same else None, old.severity if same else None)
        graded = self.selected
        if verdict != "hallucinated":  # which is not complete before its type
            self._choose_next()
        return f"{graded} {verdict}."

    def describe_error(self, **detail: str) -> str:
        """Type or severity of the chosen sentence's error."""
        label = self.current_label()
        kind, severity = detail.get("type", label.type), detail.get("severity", label.severity)
        self._save_label("hallucinated", kind, severity)
        return f"{self.selected} hallucinated, {', '.join(filter(None, [kind, severity]))}."

    def save(self) -> None:
        """Finish the item with the verdict that its sentences add up to, and go on."""
        labels = self.labels()
        missing = [s.statement_id for s in self.sentences() if s.statement_id not in labels]
        if missing:
            self.selected = missing[0]
            raise SessionError(f"Not graded yet: {', '.join(missing)}.", "Grade every sentence.")
        self._finish(sum_up(list(labels.values())))

    def toggle(self, name: str) -> str | None:
        """Switch quick mode, the detector's suggestions, the severity of what is left out, or the
        flag of the item."""
        if name == "quick":
            self.quick = not self.quick
            return "Grading the whole summary." if self.quick else "Grading by sentence."
        if name == "major":
            self.major = not self.major
            state = self.session.current_state
            if state and state.omissions:
                self._save_omissions("; ".join(o.text for o in state.omissions))
        elif name == "suggest":
            self.session.suggest(not self.session.state.suggesting)
        else:
            self.session.flag(not self.session.current_state.flagged)
        return None

    def undo(self) -> str:
        """Take the last action back."""
        event = self.session.undo()
        self._choose_first()  # of the item gone back to
        return f"Taken back: {event.action} on item {event.order_index + 1}."

    def revisit(self) -> None:
        """Show the first skipped item."""
        states = self.session.state.entries
        self.session.go_to(next(i for i, state in enumerate(states) if state.skipped))

    # --- reading the session --------------------------------------------------------------------

    def sentences(self) -> list[Sentence]:
        """The sentences of the summary that is shown; none in mode ab or at the end."""
        entry = self.session.current
        return entry.sentences() if entry and self.session.mode == "single" else []

    def labels(self) -> dict[str, SentenceGrade]:
        """The grades of sentences given so far."""
        state = self.session.current_state
        return state.labels if state else {}

    def find_sentence(self) -> Sentence | None:
        """The chosen sentence."""
        return next((s for s in self.sentences() if s.statement_id == self.selected), None)

    def current_label(self) -> SentenceGrade | None:
        """The grade of the chosen sentence."""
        return self.labels().get(self.selected)

    def static_html(self) -> str:
        """The widget as it looks now, as HTML without scripts: for executed notebooks."""
        return render_static(self._picture(is_static=True))

    def __repr__(self) -> str:
        return f"AssessmentWidget({self.session.session_id})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"text/html": self.static_html()}, metadata

    # --- inside ---------------------------------------------------------------------------------

    def _do(self, action: Callable[[], Any]) -> None:
        before = self.session.current
        try:
            said = action()
        except HallulibError as error:
            self._show(f"Not saved. {error.what} {error.next_step}", is_alert=True)
        else:
            if self.session.current != before:
                self._choose_first()
                said = said or self._name_place(before)
            self._show(said or "")

    def _name_place(self, before: Entry | None) -> str:
        entry = self.session.current
        said = f"Item {entry.order_index + 1}." if entry else "Every item is done."
        graded = before is not None and self.session.state.entries[before.order_index]
        has_feedback = self._feedback is not None and graded and graded.done
        return f"{self._feedback(before, graded) if has_feedback else 'Saved.'} {said}"

    def _finish(self, verdict: str) -> None:
        state = self.session.current_state
        self.session.grade(verdict, list(state.labels.values()), state.omissions)

    def _save_label(self, verdict: str, kind: str | None, severity: str | None) -> None:
        s = self.find_sentence()
        self.session.grade_part(
            SentenceGrade(
                statement_id=s.statement_id,
                start=s.start,
                end=s.end,
                text=s.text,
                verdict=verdict,
                type=kind,
                severity=severity,
            )
        )

    def _save_omissions(self, text: str) -> None:
        severity = "major" if self.major else "minor"
        texts = [part.strip() for part in text.split(";") if part.strip()]
        self.session.grade_part(omissions=[Omission(text=t, severity=severity) for t in texts])

    def _choose_first(self) -> None:
        """The first sentence without a grade, or the first."""
        ids = [s.statement_id for s in self.sentences()]
        self.selected = next(iter([i for i in ids if i not in self.labels()] or ids), "")

    def _choose_next(self) -> None:
        """The next sentence without a grade, wrapping around; stay when there is none."""
        ids = [s.statement_id for s in self.sentences()]
        place = ids.index(self.selected)
        later = ids[place + 1 :] + ids[:place]
        self.selected = next((i for i in later if i not in self.labels()), self.selected)

    def _suggestions(self) -> dict[str, str] | None:
        """Statement id -> what the detector objects to; None while hidden."""
        entry = self.session.current
        if self._suggest is None or not self.session.state.suggesting or entry is None:
            return None
        judged = self._suggest(entry.item_id, entry.summaries[0])
        return {
            s.statement_id: f"objects ({kind})"
            for s in self.sentences()
            for start, end, kind in judged.errors
            if start < s.end and end > s.start
        }

    def _picture(self, is_static: bool = False) -> Picture:
        entry = self.session.current
        update_buttons(self)
        opinions = self._opinions(entry) if self._opinions and entry else ()
        return Picture(
            self.session, self.buttons, self.selected, self.quick, self._suggestions(), opinions,
            is_static,
        )  # fmt: skip

    def _show(self, message: str, is_alert: bool = False) -> None:
        entry = self.session.current
        with self.hold_sync():
            self.regions = render_regions(self._picture())
            self.place = entry.order_index if entry else None
            self.message = ["alert" if is_alert else "status", message]
            self.answered += 1


def sum_up(grades: list[SentenceGrade]) -> str:
    """The whole from its parts: one hallucinated sentence makes the summary hallucinated, else one
    unsure sentence makes it unsure."""
    verdicts = {grade.verdict for grade in grades}
    return next((v for v in ("hallucinated", "unsure") if v in verdicts), "supported")

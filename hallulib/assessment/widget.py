"""The assessment widget: a thin view of a session. It holds no state that the session does not,
save which sentence is chosen.

    AssessmentWidget(open_session(run, recipe))

`widget.press("verdict_supported")` and `widget.press_key("1")` do what a click and a key do in the
browser, without one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hallulib.assessment.analyse import Opinions
from hallulib.assessment.log import Action, ItemState
from hallulib.assessment.queue import Item, Sentence
from hallulib.assessment.scripted import Judge
from hallulib.assessment.session import Session
from hallulib.detectors.tokens import EMPTY_STEMS, stem
from hallulib.errors import HallulibError, SessionError

HERE = Path(__file__).parent
BUTTONS = yaml.safe_load((HERE / "buttons.yaml").read_text("utf-8"))
TEMPLATE = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
).get_template("widget.html.j2").module  # fmt: skip
REGIONS = ("head", "panes", "work", "foot")
TITLES = {
    "assess": "Assessment of summaries", "adjudicate": "Adjudication", "practice": "Practice",
}  # fmt: skip
UNANSWERED = (
    "No answer from the kernel: the last action may not be saved. Run the notebook cell of this "
    "widget again; everything saved before is kept."
)
_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:-[^\W\d_]+)*")


class AssessmentWidget(anywidget.AnyWidget):
    """Source and summary side by side; grades by sentence, or by whole summary with `quick`.

    `suggest` gives the detector's opinion, hidden until asked for; `opinions` what others said of
    an item (adjudication); `feedback` is said of a graded one (practice).
    """

    _esm = (HERE / "widget.js").read_text("utf-8")
    _css = (HERE / "widget.css").read_text("utf-8")
    regions = traitlets.Dict().tag(sync=True)
    shortcuts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    place = traitlets.Int(allow_none=True).tag(sync=True)
    message = traitlets.List(default_value=["status", ""]).tag(sync=True)
    answered = traitlets.Int(0).tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    unanswered = traitlets.Unicode(UNANSWERED).tag(sync=True)

    def __init__(
        self,
        session: Session,
        quick: bool = False,
        suggest: Judge | None = None,
        opinions: Opinions | None = None,
        feedback: Callable[[Item, ItemState], str] | None = None,
    ) -> None:
        self.session, self.quick, self.major, self.selected = session, quick, False, ""
        self._suggest, self._opinions, self._feedback = suggest, opinions, feedback
        keys = [button["key"] for button in self.buttons.values()]
        super().__init__(shortcuts=keys, label=TITLES[session.header["role"]])
        self._choose_first()
        self._show(session.warning, is_alert=bool(session.warning))
        self.on_msg(lambda _, content, buffers: self.receive(content))

    # --- what the browser sends -----------------------------------------------------------------

    def receive(self, content: dict[str, Any]) -> None:
        """One message: a button, a key or a text field. What was meant for an item that is no
        longer shown (a double click on "save") is left undone."""
        if content.get("place") != self.place:
            self._show("")
        elif "key" in content:
            self.press_key(content["key"])
        elif content.get("field") == "note":
            self._do(lambda: self.session.act("note", text=content["text"]))
        elif content.get("field") == "omissions":
            self._do(lambda: self._save_omissions(content["text"]))
        elif content["act"].startswith("sentence:"):
            self.selected = content["act"].removeprefix("sentence:")
            self._show("")
        else:
            self.press(content["act"])

    def press_key(self, key: str) -> None:
        """What pressing a key does; a key without a button here does nothing."""
        own = [name for name, b in self.buttons.items() if b["key"] == key and b["shown"]]
        self.press(own[0]) if own else self._show("")

    def press(self, name: str) -> None:
        """Do what a button does, and show the outcome, also when it was refused."""
        button = self.buttons[name]
        value = button["value"]
        actions: dict[str, Callable[[], Any]] = {
            "verdict": lambda: self._grade(value),
            "type": lambda: self._save_label("hallucinated", type=value),
            "severity": lambda: self._save_label("hallucinated", severity=value),
            "prefer": lambda: self.session.act("prefer", preference=value),
            "go_save": self._save,
            "go_previous": lambda: self._step(-1),
            "go_next": lambda: self._step(1),
            "go_skip": lambda: self.session.act("skip"),
            "go_undo": self._undo,
            "go_flag": lambda: self.session.act("flag", on=not self.session.current_state.flagged),
            "go_revisit": self._revisit,
            "go_quick": self._toggle_quick,
            "go_suggest": lambda: self.session.act("suggest", on=not self.session.state.suggesting),
            "field_major": self._toggle_major,
        }
        if button["why_not"]:
            self._show(f"{button['text']}: {button['why_not']}")
        else:
            self._do(actions.get(name) or actions.get(button["row"]) or (lambda: None))

    # --- actions; what they return is said ------------------------------------------------------

    def _grade(self, verdict: str) -> str | None:
        if self._is_whole():
            return self.session.act("grade", verdict=verdict)
        said = self._save_label(verdict)
        if verdict != "hallucinated":  # which is not complete before its type
            ids = [sentence.sid for sentence in self.sentences]
            place = ids.index(self.selected)
            later = [sid for sid in ids[place + 1 :] + ids[:place] if sid not in self.labels]
            self.selected = next(iter(later), self.selected)
        return said

    def _save_label(self, verdict: str, **detail: str) -> str:
        old = self.labels.get(self.selected)
        if old and old.verdict == verdict:
            detail = {"type": old.type, "severity": old.severity} | detail
        self.session.act("label", sentence=self.selected, verdict=verdict, **detail)
        return f"{self.selected} {', '.join(filter(None, [verdict, *detail.values()]))}."

    def _save(self) -> None:
        """Finish the item with the verdict that its sentences add up to: one hallucinated makes
        the summary hallucinated, else one unsure makes it unsure."""
        missing = [s.sid for s in self.sentences if s.sid not in self.labels]
        if missing:
            self.selected = missing[0]
            raise SessionError(f"Not graded yet: {', '.join(missing)}.", "Grade every sentence.")
        verdicts = {label.verdict for label in self.labels.values()}
        whole = [v for v in ("hallucinated", "unsure") if v in verdicts] or ["supported"]
        self.session.act("grade", verdict=whole[0])

    def _step(self, by: int) -> None:
        ids = [sentence.sid for sentence in self.sentences]
        self.selected = ids[min(max(ids.index(self.selected) + by, 0), len(ids) - 1)]

    def _undo(self) -> str:
        action = self.session.undo()
        self._choose_first()  # of the item gone back to
        return f"Taken back: {action.do} on item {action.place + 1}."

    def _revisit(self) -> None:
        states = self.session.state.items
        self.session.act("show", place=next(i for i, state in enumerate(states) if state.skipped))

    def _toggle_quick(self) -> str:
        self.quick = not self.quick
        return "Grading the whole summary." if self.quick else "Grading by sentence."

    def _toggle_major(self) -> None:
        self.major = not self.major
        if omitted := self.session.current_state.omitted:
            self._save_omissions(omitted.text)

    def _save_omissions(self, text: str) -> None:
        severity = "major" if self.major else "minor"
        self.session.act("omit", text=text, severity=severity)

    # --- what is shown --------------------------------------------------------------------------

    @property
    def sentences(self) -> list[Sentence]:
        """The sentences to grade; none in mode ab or at the end."""
        item = self.session.current
        return item.sentences if item and self.session.header["mode"] == "single" else []

    @property
    def labels(self) -> dict[str, Action]:
        """The grades of sentences given so far."""
        state = self.session.current_state
        return state.labels if state else {}

    @property
    def buttons(self) -> dict[str, dict[str, Any]]:
        """Every button of this mode by name: row, value, text, key, hint; whether it is `shown`
        and `pressed`, and `why_not`: why it cannot be used now, "" if it can."""
        found, mode = {}, self.session.header["mode"]
        for row, entries in BUTTONS.items():
            for value, about in entries.items():
                name = f"{row}_{value}"
                known = {"name": name, "row": row, "value": value, "main": False, "focus": ""} | about
                if known.get("only", mode) == mode and (name != "go_suggest" or self._suggest):
                    found[name] = known | self._find_status(name, row, value)
        return found

    def static_html(self) -> str:
        """The widget as it looks now, as HTML without scripts: for executed notebooks."""
        return str(TEMPLATE.picture(self._look(is_static=True), self._css))

    def __repr__(self) -> str:
        return f"AssessmentWidget({self.session.log.name})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"text/html": self.static_html()}, metadata

    def _do(self, action: Callable[[], Any]) -> None:
        before = self.session.current
        try:
            said = action()
        except HallulibError as error:
            self._show(f"Not saved. {error.what} {error.next_step}", is_alert=True)
            return
        if self.session.current != before:
            self._choose_first()
            said = said or self._say_where(before)
        self._show(said or "")

    def _say_where(self, before: Item | None) -> str:
        said, item = "Saved.", self.session.current
        if before and self._feedback and self.session.state.items[before.place].done:
            said = self._feedback(before, self.session.state.items[before.place])
        return f"{said} Item {item.place + 1}." if item else f"{said} Every item is done."

    def _choose_first(self) -> None:
        """The first sentence without a grade, or the first."""
        ids = [sentence.sid for sentence in self.sentences]
        self.selected = next(iter([sid for sid in ids if sid not in self.labels] or ids), "")

    def _is_whole(self) -> bool:
        return self.quick or not self.sentences

    def _find_status(self, name: str, row: str, value: Any) -> dict[str, Any]:
        state = self.session.current_state or ItemState()
        answer, label = state.answer, self.labels.get(self.selected)
        graded, of_error = answer if self._is_whole() else label, row in ("type", "severity")
        given = {"verdict": graded and graded.verdict, "type": label and label.type,
                 "severity": label and label.severity, "prefer": answer and answer.preference}
        switches = {"go_flag": state.flagged, "go_quick": self.quick, "field_major": self.major,
                    "go_suggest": self.session.state.suggesting}  # fmt: skip
        by_sentence = of_error or name in (
            "verdict_general_knowledge", "go_save", "go_previous", "go_next",
        )  # fmt: skip
        why_not = ""
        if name == "go_undo":
            why_not = "" if self.session.state.standing else "there is nothing to undo"
        elif self.session.current is None and name != "go_revisit":
            why_not = "every item is done"
        elif of_error and (label is None or label.verdict != "hallucinated"):
            why_not = "only for a hallucinated sentence"
        hidden = by_sentence and self._is_whole()
        if name == "go_revisit":
            hidden = not self.session.state.progress()["skipped"]
        pressed = given[row] == value if row in given else switches.get(name)
        return {"pressed": pressed, "why_not": why_not, "shown": not hidden}

    def _look(self, is_static: bool = False) -> dict[str, Any]:
        """All that the template shows at one moment."""
        session, item, buttons = self.session, self.session.current, self.buttons.values()
        state = session.current_state or ItemState()
        shown = [] if self._is_whole() else self.sentences
        chosen = next((s.text for s in shown if s.sid == self.selected), "")
        suggestions = None
        if self._suggest and session.state.suggesting and item:
            judged = self._suggest(item.item_id, item.summaries[0])
            found = {s.sid: judged.find_error(s) for s in shown}
            suggestions = {sid: f"objects ({kind})" for sid, kind in found.items() if kind}
        return {
            "static": is_static,
            "header": session.header,
            "progress": session.state.progress(),
            "saved": len(session.log.actions),
            "item": item,
            "state": state,
            "sentences": shown,
            "selected": self.selected,
            "marked": mark_terms(item.source, chosen) if item else [],
            "suggestions": suggestions,
            "opinions": self._opinions(item) if self._opinions and item else [],
            "rows": {row: [b for b in buttons if b["row"] == row] for row in BUTTONS},
            "texts": {"note": state.note, "omissions": "; ".join(state.omissions)},
            "say": say_grade,
        }

    def _show(self, message: str, is_alert: bool = False) -> None:
        look = self._look()
        with self.hold_sync():
            self.regions = {name: str(getattr(TEMPLATE, name)(look)) for name in REGIONS}
            self.place = self.session.state.cursor
            self.message = ["alert" if is_alert else "status", message]
            self.answered += 1


def say_grade(action: Action) -> str:
    """A grade or a preference in the words of its button."""
    if action.preference is not None:
        return BUTTONS["prefer"][action.preference]["text"]
    said = [BUTTONS["verdict"][action.verdict]["text"], action.type, action.severity]
    return " · ".join(filter(None, said))


def mark_terms(source: str, sentence: str) -> list[tuple[str, bool]]:
    """`source` in pieces, and whether each is a number or telling word of `sentence`."""
    terms = {stem(word) for word in _WORD.findall(sentence.lower())} - EMPTY_STEMS
    pieces, end = [], 0
    for found in _WORD.finditer(source):
        if stem(found.group().lower()) in terms:
            pieces += [(source[end : found.start()], False), (found.group(), True)]
            end = found.end()
    return [*pieces, (source[end:], False)]

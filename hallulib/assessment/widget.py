"""The assessment widget: a thin view of a session. It holds no state that the session does not,
save which sentence is chosen.

    AssessmentWidget(open_session(run, recipe))

`widget.press("verdict_supported")` and `widget.press_key("1")` do what a click and a key do in the
browser, without one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from traitlets import Dict, Int, List, Unicode

from hallulib.assessment.analyse import Opinions
from hallulib.assessment.log import Action, ItemState
from hallulib.assessment.queue import Item, Sentence, mark_terms
from hallulib.assessment.scripted import Judge
from hallulib.assessment.session import Session
from hallulib.errors import HallulibError, SessionError

HERE = Path(__file__).parent
LOOK = yaml.safe_load((HERE / "widget.yaml").read_text("utf-8"))
TEMPLATE = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
).get_template("widget.html.j2").module  # fmt: skip


class AssessmentWidget(anywidget.AnyWidget):
    """Source and summary side by side; grades by sentence, or by whole summary with `quick`.

    `suggest` gives the detector's opinion, hidden until asked for; `opinions` what others said of
    an item (adjudication); `feedback` is said of a graded one (practice).
    """

    _esm = (HERE / "widget.js").read_text("utf-8")
    _css = (HERE / "widget.css").read_text("utf-8")
    regions = Dict().tag(sync=True)
    shortcuts = List(Unicode()).tag(sync=True)
    place = Int(allow_none=True).tag(sync=True)
    message = List(default_value=["status", ""]).tag(sync=True)
    answered = Int(0).tag(sync=True)
    label = Unicode().tag(sync=True)

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
        super().__init__(shortcuts=keys, label=LOOK["titles"][session.header["role"]])
        self._choose_open()
        self._show(session.warning, is_alert=bool(session.warning))
        self.on_msg(lambda _, content, buffers: self.receive(content))

    def receive(self, content: dict[str, Any]) -> None:
        """One message: a button, a key or a text field. What was meant for an item that is no
        longer shown (a double click on "save") is left undone."""
        if content.get("place") != self.place:
            self._show("")
        elif "key" in content:
            self.press_key(content["key"])
        elif "field" in content:
            self._do(lambda: self._write(content["field"], content["text"]))
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
        button, act, state = self.buttons[name], self.session.act, self.session.current_state
        value = button["value"]
        actions: dict[str, Callable[[], Any]] = {
            "verdict": lambda: self._grade(value),
            "type": lambda: self._label("hallucinated", type=value),
            "severity": lambda: self._label("hallucinated", severity=value),
            "prefer": lambda: act("prefer", preference=value),
            "go_save": self._save,
            "go_previous": lambda: self._step(-1),
            "go_next": lambda: self._step(1),
            "go_skip": lambda: act("skip"),
            "go_undo": self._undo,
            "go_flag": lambda: act("flag", on=not state.flagged),
            "go_revisit": self._revisit,
            "go_quick": self._toggle_quick,
            "go_suggest": lambda: act("suggest", on=not self.session.state.suggesting),
            "field_major": self._toggle_major,
        }
        if button["why_not"]:
            self._show(f"{button['text']}: {button['why_not']}")
        elif name in actions or button["row"] in actions:
            self._do(actions.get(name) or actions[button["row"]])

    def _grade(self, verdict: str) -> str | None:
        if self._is_whole():
            return self.session.act("grade", verdict=verdict)
        said = self._label(verdict)
        if verdict != "hallucinated":  # which is not complete before its type
            self._choose_open()
        return said

    def _label(self, verdict: str, **detail: str) -> str:
        old = self.labels.get(self.selected)
        if old and old.verdict == verdict:
            detail = {"type": old.type, "severity": old.severity} | detail
        self.session.act("label", sentence=self.selected, verdict=verdict, **detail)
        return f"{self.selected} {', '.join(filter(None, [verdict, *detail.values()]))}."

    def _save(self) -> None:
        """One hallucinated sentence makes the summary hallucinated, else one unsure unsure."""
        missing = [s.sid for s in self.sentences if s.sid not in self.labels]
        if missing:
            self.selected = missing[0]
            raise SessionError(f"Not graded yet: {', '.join(missing)}.", "Grade every sentence.")
        given = {label.verdict for label in self.labels.values()}
        worst = [v for v in ("hallucinated", "unsure", "supported") if v in {*given, "supported"}]
        self.session.act("grade", verdict=worst[0])

    def _write(self, field: str, text: str) -> None:
        if field == "note":
            self.session.act("note", text=text)
        else:
            self.session.act("omit", text=text, severity="major" if self.major else "minor")

    def _step(self, by: int) -> None:
        ids = [sentence.sid for sentence in self.sentences]
        self.selected = ids[min(max(ids.index(self.selected) + by, 0), len(ids) - 1)]

    def _undo(self) -> str:
        action = self.session.undo()
        self.selected = ""  # then the first that is open in the item gone back to
        self._choose_open()
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
            self._write("omissions", omitted.text)

    def _is_whole(self) -> bool:
        return self.quick or not self.sentences

    def _choose_open(self) -> None:
        """Choose the next sentence without a grade, wrapping around; stay where there is none."""
        ids = [sentence.sid for sentence in self.sentences]
        after = ids.index(self.selected) + 1 if self.selected in ids else 0
        pending = [sid for sid in ids[after:] + ids[:after] if sid not in self.labels]
        stay = [self.selected] if self.selected in ids else ids
        self.selected = next(iter(pending or stay), "")

    @property
    def sentences(self) -> list[Sentence]:
        """The sentences to grade; none in mode ab or at the end."""
        item = self.session.current
        return item.sentences if item and self.session.header["mode"] == "single" else []

    @property
    def labels(self) -> dict[str, Action]:
        """The grades of sentences given so far."""
        return self.session.current_state.labels

    @property
    def buttons(self) -> dict[str, dict[str, Any]]:
        """Every button of this mode by name: row, value, text, key, hint; whether it is `shown`
        and `pressed`, and `why_not`: why it cannot be used now, "" if it can."""
        found, mode = {}, self.session.header["mode"]
        for row, entries in LOOK["buttons"].items():
            for value, about in entries.items():
                name = f"{row}_{value}"
                if about.get("only", mode) == mode and (name != "go_suggest" or self._suggest):
                    shown = about.get("whole", True) or not self._is_whole()
                    found[name] = {"name": name, "row": row, "value": value, "shown": shown}
                    found[name] |= about | self._find_status(name, row, value)
        found["go_revisit"]["shown"] = any(state.skipped for state in self.session.state.items)
        return found

    def _find_status(self, name: str, row: str, value: Any) -> dict[str, Any]:
        state, label = self.session.current_state, self.labels.get(self.selected)
        graded = state.answer if self._is_whole() else label
        given = {
            "verdict": graded and graded.verdict,
            "type": label and label.type,
            "severity": label and label.severity,
            "prefer": state.answer and state.answer.preference,
        }
        switches = {
            "go_flag": state.flagged,
            "go_quick": self.quick,
            "go_suggest": self.session.state.suggesting,
            "field_major": self.major,
        }
        why_not = "every item is done" if self.session.current is None else ""
        if name == "go_undo":
            why_not = "" if self.session.state.standing else "there is nothing to undo"
        elif name == "go_revisit":
            why_not = ""
        elif row in ("type", "severity") and (label is None or label.verdict != "hallucinated"):
            why_not = "only for a hallucinated sentence"
        pressed = given[row] == value if row in given else switches.get(name)
        return {"pressed": pressed, "why_not": why_not}

    def static_html(self) -> str:
        """The widget as it looks now, as HTML without scripts: for executed notebooks."""
        return str(TEMPLATE.picture(self._look() | {"static": True}, self._css))

    def __repr__(self) -> str:
        return f"AssessmentWidget({self.session.log.name})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"text/html": self.static_html()}, metadata

    def _do(self, action: Callable[[], Any]) -> None:
        before = self.session.current
        try:
            said = action() or ""
        except HallulibError as error:
            self._show(f"Not saved. {error.what} {error.next_step}", is_alert=True)
            return
        if self.session.current != before:
            self.selected = ""
            self._choose_open()
            said = said or self._say_where(before)
        self._show(said)

    def _say_where(self, before: Item | None) -> str:
        said, item = "Saved.", self.session.current
        graded = self.session.state.items[before.place] if before else ItemState()
        if self._feedback and graded.done:
            said = self._feedback(before, graded)
        return f"{said} Item {item.place + 1}." if item else f"{said} Every item is done."

    def _look(self) -> dict[str, Any]:
        """All that the template shows at one moment."""
        session, item, buttons = self.session, self.session.current, self.buttons.values()
        shown = [] if self._is_whole() else self.sentences
        chosen = next((s.text for s in shown if s.sid == self.selected), "")
        objections = None
        if self._suggest and session.state.suggesting and item:
            judged = self._suggest(item.item_id, item.summaries[0])
            objections = {s.sid: judged.find_error(s) for s in shown}
        return {
            "static": False,
            "header": session.header,
            "progress": session.state.progress(),
            "saved": len(session.log.actions),
            "item": item,
            "state": session.current_state,
            "sentences": shown,
            "selected": self.selected,
            "marked": mark_terms(item.source, chosen) if item else [],
            "objections": objections,
            "opinions": self._opinions(item) if self._opinions and item else [],
            "rows": {row: [b for b in buttons if b["row"] == row] for row in LOOK["buttons"]},
            "say": say_grade,
        }

    def _show(self, message: str, is_alert: bool = False) -> None:
        look, names = self._look(), ("head", "panes", "work", "foot")
        with self.hold_sync():
            self.regions = {name: str(getattr(TEMPLATE, name)(look)) for name in names}
            self.place = self.session.state.cursor
            self.message = ["alert" if is_alert else "status", message]
            self.answered += 1


def say_grade(action: Action) -> str:
    """A grade or a preference in the words of its button."""
    if action.preference is not None:
        return LOOK["buttons"]["prefer"][action.preference]["text"]
    verdict = LOOK["buttons"]["verdict"][action.verdict]["text"]
    return " · ".join(filter(None, [verdict, action.type, action.severity]))

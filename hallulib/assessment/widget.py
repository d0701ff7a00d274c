"""The assessment widget: a thin view of a session. It holds no state that the session does not,
save which sentence is chosen.

`widget.press("verdict_supported")` does what a click does in the browser, without one.
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
from hallulib.assessment.queue import Item, Sentence, mark_terms
from hallulib.assessment.scripted import Judge
from hallulib.assessment.session import Session
from hallulib.errors import HallulibError, SessionError

HERE = Path(__file__).parent
LOOK = yaml.safe_load((HERE / "widget.yaml").read_text("utf-8"))
PLAIN = {"only": "", "main": False, "toggle": False, "focus": "", "needs": "item", "when": ""}
BUTTONS = {
    f"{row}_{value}": PLAIN | about | {"name": f"{row}_{value}", "row": row, "value": value}
    for row, entries in LOOK["buttons"].items()
    for value, about in entries.items()
}


def say_grade(grade: dict[str, Any]) -> str:
    """A grade or a preference in the words of its button."""
    verdict = grade["verdict"]
    name = f"verdict_{verdict}" if verdict else f"prefer_{grade['preference']}"
    found = [BUTTONS[name]["text"], grade.get("type"), grade.get("severity")]
    return " · ".join(filter(None, found))


TEMPLATE = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
).get_template("widget.html.j2", globals={"mark": mark_terms, "say": say_grade}).module  # fmt: skip


class AssessmentWidget(anywidget.AnyWidget):
    """Source and summary side by side; grades by sentence, or by whole summary with `quick`.

    `suggest` gives the detector's opinion, hidden until asked for; `opinions` what others said of
    an item (adjudication); `feedback` is said of a graded one (practice).
    """

    _esm = (HERE / "widget.js").read_text("utf-8")
    _css = (HERE / "widget.css").read_text("utf-8")
    regions = Dict().tag(sync=True)
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
        feedback: Callable[[Item, dict], str] | None = None,
    ) -> None:
        self.session, self.quick, self.selected = session, quick, ""
        self.suggest, self.opinions, self.feedback = suggest, opinions, feedback
        super().__init__(label=LOOK["titles"][session.header["role"]])
        self._choose_open()
        self._show(session.warning, is_alert=bool(session.warning))
        self.on_msg(lambda _, content, buffers: self.receive(content))

    def receive(self, content: dict[str, Any]) -> None:
        """One message: a button or a text field. What was meant for an item that is no longer shown
        (a double click on "save") is left undone."""
        if content["place"] != self.place:
            self._show("")
        elif "act" in content:
            self.press(content["act"])
        else:
            do = {"note": "note", "omissions": "omit"}[content["field"]]
            self._do(lambda: self.session.act(do, text=content["text"]))

    def press(self, name: str) -> None:
        """Do what a button does, and show the outcome, also when it was refused."""
        button = self.buttons.get(name, {"why_not": ""})
        if button["why_not"]:
            self._show(f"{button['text']}: {button['why_not']}")
        elif name.startswith("sentence_"):
            self.selected = name.removeprefix("sentence_")
            self._show("")
        else:
            self._do(lambda: self._act(button["row"], button["value"]))

    def _act(self, row: str, value: Any) -> str | None:
        """What a button means; returns what is said of it, if not just that it was saved."""
        act, log = self.session.act, self.session.log
        ids = [sentence.sid for sentence in self.sentences]
        match row, value:
            case "verdict", _ if not ids:
                act("grade", verdict=value)
            case "verdict", _:
                return self._label(value)
            case "type" | "severity", _:
                return self._label("hallucinated", **{row: value})
            case "prefer", _:
                act("prefer", preference=value)
            case "go", "save":  # one hallucinated sentence decides, else one unsure
                missing = [sid for sid in ids if sid not in self.labels]
                if missing:
                    self.selected = missing[0]
                    why = f"Not graded yet: {', '.join(missing)}."
                    raise SessionError(why, "Grade every sentence.")
                given = [label["verdict"] for label in self.labels.values()]
                worst = next((v for v in ("hallucinated", "unsure") if v in given), "supported")
                act("grade", verdict=worst)
            case "go", "previous" | "next":
                place = ids.index(self.selected) + (1 if value == "next" else -1)
                self.selected = ids[min(max(place, 0), len(ids) - 1)]
            case "go", "skip":
                act("skip")
            case "go", "undo":
                action = self.session.undo()
                self._choose_open(anew=True)
                return f"Taken back: {action.do} on item {action.place + 1}."
            case "go", "flag":
                act("flag", on=not self.session.said["flagged"])
            case "go", "revisit":
                act("show", place=[said["answer"] for said in log.items].index("skip"))
            case "go", "quick":
                self.quick = not self.quick
                self._choose_open(anew=True)
                return "Grading the whole summary." if self.quick else "Grading by sentence."
            case "go", "suggest":
                act("suggest", on=not log.suggesting)

    def _label(self, verdict: str, **detail: str) -> str:
        old = self.labels.get(self.selected, {})
        if old.get("verdict") == verdict:
            detail = old | detail
        self.session.act("label", sentence=self.selected, **(detail | {"verdict": verdict}))
        said = ", ".join(filter(None, self.labels[self.selected].values()))
        said = f"{self.selected} {said}."
        if verdict != "hallucinated":  # which is not complete before its type
            self._choose_open()
        return said

    def _choose_open(self, anew: bool = False) -> None:
        """Choose the next sentence without a grade (anew: from the first on), wrapping around; stay
        where there is none."""
        ids = [sentence.sid for sentence in self.sentences]
        after = 0 if anew or self.selected not in ids else ids.index(self.selected) + 1
        places = ids[after:] + ids[:after]
        pending = [sid for sid in places if sid not in self.labels] or places[-1 if after else 0 :]
        self.selected = next(iter(pending), "")

    @property
    def sentences(self) -> list[Sentence]:
        """The sentences to grade; none where the whole summary is, in mode ab, or at the end."""
        item, is_whole = self.session.current, self.quick or self.session.header["mode"] == "ab"
        return [] if is_whole or item is None else item.sentences

    @property
    def labels(self) -> dict[str, dict]:
        """The grades of sentences given so far."""
        return self.session.said["labels"]

    @property
    def buttons(self) -> dict[str, dict[str, Any]]:
        """Every button of this mode by name: row, value, text, key, hint; whether it is `shown`
        and `pressed`, and `why_not`: why it cannot be used now, "" if it can."""
        log, said, label = self.session.log, self.session.said, self.labels.get(self.selected, {})
        has = {
            "": True,
            "item": self.session.current,
            "sentence": self.sentences,
            "hallucinated": label.get("verdict") == "hallucinated",
            "undo": log.standing,
            "skipped": any(item["answer"] == "skip" for item in log.items),
            "detector": self.suggest,
        }
        pressed = {f"{row}_{label.get(row)}" for row in ("type", "severity")}
        verdict = (label if self.sentences else said).get("verdict")
        pressed |= {f"verdict_{verdict}", f"prefer_{said['preference']}"}
        switches = {"flag": said["flagged"], "quick": self.quick, "suggest": log.suggesting}
        pressed |= {f"go_{name}" for name, is_on in switches.items() if is_on}
        return {
            name: button | {
                "shown": bool(has[button["when"]]),
                "pressed": name in pressed,
                "why_not": "" if has[button["needs"]] else LOOK["reasons"][button["needs"]],
            }
            for name, button in BUTTONS.items()
            if button["only"] in ("", self.session.header["mode"])
        }  # fmt: skip

    def static_html(self) -> str:
        """The widget as it looks now, as HTML without scripts: for executed notebooks."""
        return str(TEMPLATE.picture(self, self._css))

    def __repr__(self) -> str:
        return f"AssessmentWidget({self.session.log.name})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"text/html": self.static_html()}, metadata

    def _do(self, action: Callable[[], str | None]) -> None:
        """Try an action, and say what came of it."""
        before = self.session.current
        try:
            said = action() or ""
        except HallulibError as error:
            self._show(f"Not saved. {error.what} {error.next_step}", is_alert=True)
            return
        item = self.session.current
        if item != before:
            self._choose_open(anew=True)
            where = f"Item {item.place + 1}." if item else "Every item is done."
            graded = self.session.log.items[before.place] if before else {}
            is_told = self.feedback and graded.get("answer") == "grade"
            said = said or f"{self.feedback(before, graded) if is_told else 'Saved.'} {where}"
        self._show(said)

    def _show(self, message: str, is_alert: bool = False) -> None:
        with self.hold_sync():
            names = ("head", "panes", "work", "foot")
            self.regions = {name: str(getattr(TEMPLATE, name)(self, False)) for name in names}
            self.place = self.session.log.cursor
            self.message = ["alert" if is_alert else "status", message]
            self.answered += 1

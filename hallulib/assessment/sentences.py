"""The optional part of the widget that grades sentence by sentence."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import ipywidgets as widgets

from hallulib.assessment.events import ERROR_TYPES, SEVERITIES, SentenceGrade
from hallulib.assessment.queue import Entry, Sentence
from hallulib.assessment.state import EntryState
from hallulib.errors import SessionError

_VERDICTS = [
    ("choose …", ""),
    ("✓ supported", "supported"),
    ("✗ hallucinated", "hallucinated"),
    ("? unsure", "unsure"),
    ("general medical knowledge", "general_knowledge"),
]
_TYPES = [("type …", "")] + [(f"{name}: {text}", name) for name, text in ERROR_TYPES.items()]
_SEVERITIES = [("severity …", "")] + [(f"{n}: {text}", n) for n, text in SEVERITIES.items()]


class SentenceRow(widgets.HBox):
    """One sentence with its choices; type and severity show only for a hallucination."""

    def __init__(self, sentence: Sentence, given: SentenceGrade | None) -> None:
        self.sentence = sentence
        text = widgets.HTML(
            f"<b>{sentence.statement_id}</b> {escape(sentence.text)}",
            layout=widgets.Layout(flex="1 1 320px", min_width="0"),
        )
        self.verdict = _choose("Verdict", _VERDICTS, given.verdict if given else "", "190px")
        self.type = _choose("Type", _TYPES, given and given.type, "190px")
        self.severity = _choose("Severity", _SEVERITIES, given and given.severity, "150px")
        self.verdict.observe(lambda _: self._show_details(), names="value")
        layout = widgets.Layout(flex_flow="row wrap", width="100%")
        super().__init__([text, self.verdict, self.type, self.severity], layout=layout)
        self.add_class("hlw-sentence")
        self._show_details()

    def _show_details(self) -> None:
        display = "" if self.verdict.value == "hallucinated" else "none"
        self.type.layout.display = self.severity.layout.display = display

    def read(self) -> SentenceGrade:
        """The grade as chosen. Raises SessionError when no verdict is chosen."""
        s, verdict = self.sentence, self.verdict.value
        if not verdict:
            raise SessionError(f"Sentence {s.statement_id} has no verdict.", "Choose one.")
        wrong = verdict == "hallucinated"
        return SentenceGrade(
            statement_id=s.statement_id, start=s.start, end=s.end, text=s.text, verdict=verdict,
            type=(self.type.value or None) if wrong else None,
            severity=(self.severity.value or None) if wrong else None,
        )


class SentencePanel(widgets.VBox):
    """A row per sentence and a button that saves them all. Closed until `is_open` is set."""

    def __init__(self, on_save: Callable[[], None]) -> None:
        self.is_open = False
        self.rows: list[SentenceRow] = []
        self.save = widgets.Button(
            description="Save sentence grades", layout=widgets.Layout(width="auto")
        )
        self.save.on_click(lambda _: on_save())
        super().__init__([])

    def fill(self, entry: Entry | None, state: EntryState | None) -> None:
        """Show the sentences of `entry`, with the grades already given."""
        if not self.is_open or entry is None:
            self.rows, self.children = [], ()
            return
        grade = state.grades.get(1) if state else None
        given = {label.statement_id: label for label in grade.labels} if grade else {}
        self.rows = [SentenceRow(s, given.get(s.statement_id)) for s in entry.sentences()]
        self.children = (*self.rows, self.save)

    def read(self) -> list[SentenceGrade]:
        """Every row's grade. Raises SessionError while one is missing."""
        return [row.read() for row in self.rows]

    @staticmethod
    def verdict(grades: list[SentenceGrade]) -> str:
        """The whole from its parts: one hallucinated sentence makes the summary hallucinated, else
        one unsure sentence makes it unsure."""
        verdicts = {grade.verdict for grade in grades}
        return next((v for v in ("hallucinated", "unsure") if v in verdicts), "supported")


def _choose(label: str, options: list, value: str | None, width: str) -> widgets.Dropdown:
    return widgets.Dropdown(
        options=options, value=value or "", tooltip=label, layout=widgets.Layout(width=width)
    )

"""Practice before the real session: a few items with known answers, and what is said of a grade."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from hallulib.assessment.events import SentenceGrade
from hallulib.assessment.opening import SessionSettings
from hallulib.assessment.queue import Entry, Slotting
from hallulib.assessment.session import AssessmentSession
from hallulib.assessment.simulate import Judged
from hallulib.assessment.state import EntryState
from hallulib.recipe import Recipe
from hallulib.run import Run

Key = list[tuple[str, str | None, str]]


def open_practice(run: Run, recipe: Recipe, assessor: str = "") -> AssessmentSession:
    """Start or continue the practice of an assessor. It lies in a folder of its own, so that no
    analysis takes it for an assessment."""
    items = _read_items()
    rows = [
        {"id": name, "system": "practice", "context": item["note"], "text": item["summary"]}
        for name, item in items.items()
    ]
    settings = SessionSettings(
        assessor or recipe.assessment.assessor, items=len(rows), repeat_share=0.0,
        seed=recipe.seed, role="practice",
    )  # fmt: skip
    queue = [Slotting(name, ("practice",)) for name in items]
    return AssessmentSession(run.path("assessment/practice"), rows, settings, queue)


def explain_grades(entry: Entry, state: EntryState) -> str:
    """What the key says of an item that has been graded, sentence by sentence."""
    wrong = []
    for sentence, (verdict, kind, why) in zip(entry.sentences(), key_of(entry), strict=True):
        if not _agrees(state.labels.get(sentence.statement_id), verdict, kind):
            said = verdict.replace("_", " ") + (f", {kind}" if kind else "")
            wrong.append(f"{sentence.statement_id} is {said}: {why}")
    place = f"Practice item {entry.order_index + 1}: "
    return place + ("; ".join(wrong) if wrong else "all as in the key") + "."


def score_practice(session: AssessmentSession) -> tuple[int, int]:
    """(sentences graded as in the key, sentences graded)."""
    found = [
        _agrees(state.labels.get(sentence.statement_id), verdict, kind)
        for entry, state in zip(session.entries, session.state.entries, strict=True)
        if state.done
        for sentence, (verdict, kind, _) in zip(entry.sentences(), key_of(entry), strict=True)
    ]
    return sum(found), len(found)


def judge_practice(item_id: str, summary: str) -> Judged:
    """The key as a judge, for the scripted assessor. It knows no "general knowledge"."""
    entry = Entry(0, item_id, "", (summary,), False)
    errors = [
        (sentence.start, sentence.end, kind)
        for sentence, (verdict, kind, _) in zip(entry.sentences(), key_of(entry), strict=True)
        if verdict == "hallucinated"
    ]
    return Judged(tuple(errors))


def key_of(entry: Entry) -> Key:
    """(verdict, error type, why) of each sentence of a practice item."""
    return [tuple(answer) for answer in _read_items()[entry.item_id]["key"]]


def _agrees(label: SentenceGrade | None, verdict: str, kind: str | None) -> bool:
    return label is not None and (label.verdict, label.type) == (verdict, kind)


@cache
def _read_items() -> dict[str, dict]:
    text = Path(__file__).with_name("practice.json").read_text("utf-8")
    return {item["id"]: item for item in json.loads(text)}

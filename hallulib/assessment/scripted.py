"""Grading by rule: a scripted assessor, whose grades are marked as simulated everywhere, and
practice with a known key."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hallulib.assessment.log import ERROR_TYPES
from hallulib.assessment.queue import Item, make_place, split_sentences
from hallulib.assessment.session import SIMULATED, Session, make_header, read_generations
from hallulib.errors import SessionError
from hallulib.files import read_jsonl
from hallulib.recipe import Recipe
from hallulib.run import Run

_PRACTICE = json.loads(Path(__file__).with_name("practice.json").read_text("utf-8"))


class Judged(NamedTuple):
    """What is wrong with one summary: sentence id to error type, kinds left out, and whether it
    could be judged at all."""

    errors: dict[str, str] = {}
    omissions: list[str] = []
    readable: bool = True


Judge = Callable[[str, str], Judged]  # of item id and summary; it is not told the system


def judge_by_evaluation(run: Run) -> Judge:
    """A judge that looks the detector's verdicts up in evaluation/evaluation.jsonl, by the text of
    a summary, so that the session need not tell it which system wrote it."""
    rows, known = read_generations(run), {}
    for row in read_jsonl(run.require("evaluation/evaluation.jsonl")):
        known[str(row["id"]), rows[str(row["id"]), row["system"]]["text"]] = row

    def judge(item_id: str, summary: str) -> Judged:
        row, errors = known[item_id, summary], {}
        wrong = [s for s in row["statements"] if s["verdict"] in ("contradicted", "not_in_note")]
        for sentence in split_sentences(summary):
            here = [s for s in wrong if s["start"] < sentence.end and s["end"] > sentence.start]
            kinds = [s["error_type"] if s["error_type"] in ERROR_TYPES else "other" for s in here]
            if kinds:
                errors[sentence.sid] = kinds[0]
        return Judged(errors, row["omissions"], row["hallucinated"] is not None)

    return judge


def simulate_assessment(session: Session, judge: Judge, error_rate: float = 0.1) -> int:
    """Grade what is pending in `session` with `judge`, wrong in a share `error_rate` of items;
    returns how many.

    Errors are drawn per item from the session's seed, so a repeated item may get another grade, as
    with a person. Raises SessionError unless the session's assessor is "simulated": these grades
    must never pass for a person's.
    """
    if session.header["assessor_kind"] != SIMULATED:
        why = (
            f"'{session.header['assessor']}' is a person's session; a script must not grade in it."
        )
        raise SessionError(why, f'Open one as assessor "{SIMULATED}".')
    graded = 0
    while item := session.current:
        rng = random.Random(f"{session.header['seed']}-{item.place}-{item.item_id}")
        found = [judge(item.item_id, summary) for summary in item.summaries]
        errs = rng.random() < error_rate
        if session.header["mode"] == "ab":
            excess = max(-2, min(2, len(found[0].errors) - len(found[1].errors)))
            session.act("prefer", preference=-excess if errs else excess)
        elif found[0].readable:
            _grade(session, found[0], errs)
        else:
            session.act("grade", verdict="unsure")
        graded += 1
    return graded


def _grade(session: Session, judged: Judged, errs: bool) -> None:
    """Sentence by sentence; a slip is one of the whole verdict: it overlooks every error, or sees
    one where there is none."""
    for sentence in session.current.sentences if not errs else ():
        kind = judged.errors.get(sentence.sid)
        verdict = "hallucinated" if kind else "supported"
        session.act("label", sentence=sentence.sid, verdict=verdict, type=kind)
    if judged.omissions:
        session.act("omit", text="; ".join(judged.omissions))
    session.act("grade", verdict="hallucinated" if bool(judged.errors) != errs else "supported")


def open_practice(run: Run, recipe: Recipe, assessor: str = "") -> Session:
    """Start or continue the practice of an assessor, in a folder of its own: no assessment."""
    rows = {(name, "practice"): item for name, item in _PRACTICE.items()}
    queue = [make_place(name, ["practice"]) for name in _PRACTICE]
    header = make_header(assessor or recipe.assessment.assessor, recipe.seed, role="practice")
    return Session(run.path("assessment/practice"), rows, queue, header)


def explain_grades(item: Item, state: dict[str, Any]) -> str:
    """What the key says of an item that has been graded, sentence by sentence."""
    wrong, key = [], _PRACTICE[item.item_id]["key"]
    for sentence, (verdict, kind, why) in zip(item.sentences, key, strict=True):
        label = state["labels"].get(sentence.sid)
        if label is None or (label["verdict"], label["type"]) != (verdict, kind):
            said = ", ".join(filter(None, [verdict.replace("_", " "), kind]))
            wrong.append(f"; {sentence.sid} is {said}: {why}")
    right = f"{len(key) - len(wrong)} of {len(key)} sentences as in the key"
    return f"Practice item {item.place + 1}: {right}{''.join(wrong)}."


def judge_practice(item_id: str, summary: str) -> Judged:
    """The key as a judge, for the scripted assessor. It knows no "general knowledge"."""
    key = enumerate(_PRACTICE[item_id]["key"], start=1)
    return Judged({f"s{n}": kind for n, (_, kind, _) in key if kind})

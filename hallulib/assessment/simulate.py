"""A scripted assessor, for runs without a person. Its grades are marked as simulated everywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hallulib.assessment.events import ERROR_TYPES, SIMULATED, Omission, SentenceGrade
from hallulib.assessment.opening import read_generations
from hallulib.assessment.queue import Entry, Sentence
from hallulib.assessment.session import AssessmentSession
from hallulib.errors import SessionError
from hallulib.run import Run


@dataclass(frozen=True)
class Judged:
    """What an oracle says about one summary: wrong stretches as (start, end, error type), kinds
    left out, and whether it could judge at all."""

    errors: tuple[tuple[int, int, str], ...] = ()
    omissions: tuple[str, ...] = ()
    readable: bool = True


# (item id, text of the summary) -> what is wrong with it. It is not told the system.
Judge = Callable[[str, str], Judged]


def judge_by_evaluation(run: Run) -> Judge:
    """A judge that looks the detector's verdicts up in evaluation/evaluation.jsonl.

    It knows a summary by its text, so that the session need not tell it which system wrote it.
    """
    rows = read_generations(run.require("evaluation/generations.jsonl"))
    verdicts = _read_verdicts(run.require("evaluation/evaluation.jsonl"))
    known = {
        (str(row["id"]), row["text"]): verdicts[str(row["id"]), row["system"]]
        for row in rows
        if (str(row["id"]), row["system"]) in verdicts
    }

    def judge(item_id: str, summary: str) -> Judged:
        try:
            return known[item_id, summary]
        except KeyError:
            raise SessionError(
                f"evaluation.jsonl has no verdict on a summary of item '{item_id}'.",
                "Run notebook 06_evaluation again.",
            ) from None

    return judge


def simulate_assessment(
    session: AssessmentSession, judge: Judge, error_rate: float = 0.1, limit: int | None = None
) -> int:
    """Grade what is pending in `session` with `judge`, wrong in a share `error_rate` of entries.

    Errors are drawn per entry from the session's seed, so a repeated item may get another grade, as
    with a person. Returns the number of entries graded (at most `limit`). Raises SessionError
    unless the session's assessor is "simulated": these grades must never pass for a person's.
    """
    if session.header.assessor_kind != SIMULATED:
        raise SessionError(
            f"'{session.header.assessor_id}' is a person's session; a script must not grade in it.",
            f'Open one for the script: open_session(run, recipe, assessor="{SIMULATED}").',
        )
    graded = 0
    while (entry := session.current) is not None and graded != limit:
        rng = random.Random(f"{session.header.seed}-{entry.order_index}-{entry.item_id}")
        errs = rng.random() < error_rate
        if session.mode == "ab":
            _prefer(session, entry, judge, errs)
        else:
            _grade(session, entry, judge, errs)
        graded += 1
    return graded


def _read_verdicts(path: Path) -> dict[tuple[str, str], Judged]:
    verdicts = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        errors = tuple(
            (s["start"], s["end"], s["error_type"] if s["error_type"] in ERROR_TYPES else "other")
            for s in row["statements"]
            if s["verdict"] in ("contradicted", "not_in_note")
        )
        readable = row["hallucinated"] is not None
        judged = Judged(errors, tuple(row["omissions"]), readable)
        verdicts[str(row["id"]), row["system"]] = judged
    return verdicts


def _grade(session: AssessmentSession, entry: Entry, judge: Judge, errs: bool) -> None:
    judged = judge(entry.item_id, entry.summaries[0])
    sentences = [_grade_sentence(s, judged.errors) for s in entry.sentences()]
    if not judged.readable:
        session.grade("unsure", note="simulated: the detector could not read this summary")
        return
    hallucinated = any(s.verdict == "hallucinated" for s in sentences)
    if errs:  # a slip of the whole verdict: overlooks every error, or sees one where there is none
        hallucinated = not hallucinated
        sentences = []
    omissions = [Omission(text=kind) for kind in judged.omissions]
    session.grade("hallucinated" if hallucinated else "supported", sentences, omissions)


def _grade_sentence(sentence: Sentence, errors: tuple[tuple[int, int, str], ...]) -> SentenceGrade:
    found = [kind for start, end, kind in errors if start < sentence.end and end > sentence.start]
    place = {
        "statement_id": sentence.statement_id,
        "start": sentence.start,
        "end": sentence.end,
        "text": sentence.text,
    }
    if not found:
        return SentenceGrade(**place, verdict="supported")
    return SentenceGrade(**place, verdict="hallucinated", type=found[0])


def _prefer(session: AssessmentSession, entry: Entry, judge: Judge, errs: bool) -> None:
    """Prefer the summary with fewer errors, strongly when the other has two or more in excess."""
    first, second = (len(judge(entry.item_id, text).errors) for text in entry.summaries)
    preference = max(-2, min(2, first - second))
    session.prefer(-preference if errs else preference)

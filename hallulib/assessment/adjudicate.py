"""Settling what assessors disagree on, in the same view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hallulib.assessment.compare import collect_grades, find_disagreements
from hallulib.assessment.opening import SessionSettings, read_generations
from hallulib.assessment.queue import Entry
from hallulib.assessment.records import GENERATIONS, choose_assessors, keep_current, read_sessions
from hallulib.assessment.render import Opinion
from hallulib.assessment.session import AssessmentSession
from hallulib.assessment.start import PATIENCE
from hallulib.errors import SessionError
from hallulib.recipe import Recipe
from hallulib.run import Run


@dataclass(frozen=True)
class Adjudication:
    """A session over the summaries on which assessors differ, and what each said of one of them."""

    session: AssessmentSession
    opinions: Callable[[Entry], list[Opinion]]


def open_adjudication(run: Run, recipe: Recipe, assessor: str) -> Adjudication:
    """Start or continue settling what the assessors of this run disagree on, in the same view.

    The systems stay sealed and the assessors are letters. Raises SessionError where fewer than two
    have graded the same summaries, or where nothing is in dispute.
    """
    records = choose_assessors(keep_current(read_sessions(run), run), "single")
    queue = find_disagreements(records, recipe.seed)
    if not queue:
        raise SessionError(
            f"{len(records)} assessor(s) have graded, and no summary has two different verdicts.",
            "Let a second assessor grade: open_session(run, recipe, assessor=...).",
        )
    settings = SessionSettings(
        assessor, items=len(queue), repeat_share=0.0, seed=recipe.seed, role="adjudicate",
        patience=PATIENCE,
    )  # fmt: skip
    rows = read_generations(run.require(GENERATIONS))
    session = AssessmentSession(run.path("assessment"), rows, settings, queue)
    grades = [collect_grades(record) for record in records]

    def opinions(entry: Entry) -> list[Opinion]:
        place = entry.item_id, queue[entry.order_index].systems[0]
        letters = enumerate(own.get(place) for own in grades)
        return [Opinion(f"Assessor {chr(65 + n)}", grade) for n, grade in letters if grade]

    return Adjudication(session, opinions)

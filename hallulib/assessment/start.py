"""Opening sessions on a run: an assessor's own, or the adjudication of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hallulib.assessment.compare import collect_grades, find_disagreements
from hallulib.assessment.opening import SessionSettings, read_generations
from hallulib.assessment.queue import Entry
from hallulib.assessment.records import GENERATIONS, choose_assessors, keep_current, read_sessions
from hallulib.assessment.render import Opinion
from hallulib.assessment.session import AssessmentSession
from hallulib.errors import SessionError
from hallulib.recipe import Recipe
from hallulib.run import Run

PATIENCE = 10.0


@dataclass(frozen=True)
class Adjudication:
    """A session over the summaries on which assessors differ, and what each said of one of them."""

    session: AssessmentSession
    opinions: Callable[[Entry], list[Opinion]]


def open_session(run: Run, recipe: Recipe, assessor: str = "", name: str = "") -> AssessmentSession:
    """Start or continue the session of `assessor` (default: the recipe's) on this run's summaries.

    An assessor whose name begins with "simulated" is recorded as such. Raises MissingArtifact
    before notebook 06, SessionError when the session is open elsewhere or belongs to other
    summaries.
    """
    chosen = recipe.assessment
    settings = SessionSettings(
        assessor=assessor or chosen.assessor, mode=chosen.mode, items=chosen.items,
        repeat_share=chosen.repeat_share, seed=recipe.seed, name=name, patience=PATIENCE,
    )
    rows = read_generations(run.require(GENERATIONS))
    return AssessmentSession(run.path("assessment"), rows, settings)


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

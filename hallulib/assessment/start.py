"""Opening an assessor's session on a run. Light: what only an analysis needs is not imported."""

from __future__ import annotations

from hallulib.assessment.opening import SessionSettings, read_generations
from hallulib.assessment.records import GENERATIONS
from hallulib.assessment.session import AssessmentSession
from hallulib.recipe import Recipe
from hallulib.run import Run

# Seconds that a new kernel waits for the one before it to end.
PATIENCE = 10.0


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
